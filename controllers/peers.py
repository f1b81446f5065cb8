"""How controllers speak with each other: torch RPC behind a narrow interface, or nothing at all on one node.

Bytes go in and bytes come out, so that what RPC pickles is a name and a string of bytes. RPC has no secret: off
loopback it needs a network that is trusted. Every call has a timeout, and after a failure nothing waits for a graceful
end. The only file of the controllers that imports torch, and only when there is more than one node.
"""

from __future__ import annotations

import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import timedelta
from queue import Empty, SimpleQueue
from typing import Any, Protocol
from urllib.parse import urlparse

from controllers.meeting import name_of_start
from controllers.topology import Topology

Handler = Callable[[int, bytes], bytes]
"""handler(node that asks, payload) -> answer. Runs in a thread of the peers' own; must be brief."""

_PING = "peers/ping"
_HEARTBEAT_S = 1.0
_THREADS = 8
_CLOSE_S = 2.0
_SCHEME = "flowrl"


class Peers(Protocol):
    """Register the handlers, then `start`. `node` itself may be addressed like any other."""

    node: int
    num_nodes: int

    def register(self, handler_name: str, handler: Handler) -> None: ...

    def start(self) -> None:
        """Returns when all nodes are there."""
        ...

    def ask(self, node: int, handler_name: str, payload: bytes, timeout_s: float) -> Future[bytes]:
        """An answer to come. Its exception is ConnectionError when the node cannot be reached in time."""
        ...

    def call(self, node: int, handler_name: str, payload: bytes, timeout_s: float) -> bytes:
        """`ask`, and wait."""
        ...

    def post(self, node: int, handler_name: str, payload: bytes) -> None:
        """Without an answer; posts from one node to another arrive in order."""
        ...

    def broadcast(self, handler_name: str, payload: bytes) -> None:
        """Posts to all others."""
        ...

    def close(self, is_orderly: bool) -> None:
        """Sends what has been posted, as far as the others still listen. is_orderly: all nodes close now, and none is
        lost; they then wait for each other, for a while."""
        ...


class Alone:
    """Peers of a run of one node."""

    node = 0
    num_nodes = 1

    def __init__(self) -> None:
        self._handlers: dict[str, Handler] = {}

    def register(self, handler_name: str, handler: Handler) -> None:
        self._handlers[handler_name] = handler

    def start(self) -> None:
        """Nobody to wait for."""

    def ask(self, node: int, handler_name: str, payload: bytes, timeout_s: float) -> Future[bytes]:
        assert node == 0, f"node {node}: there is but one"
        return _completed(self._handlers[handler_name], 0, payload)

    def call(self, node: int, handler_name: str, payload: bytes, timeout_s: float) -> bytes:
        return self.ask(node, handler_name, payload, timeout_s).result()

    def post(self, node: int, handler_name: str, payload: bytes) -> None:
        self.ask(node, handler_name, payload, 0.0)

    def broadcast(self, handler_name: str, payload: bytes) -> None:
        """There are no others."""

    def close(self, is_orderly: bool) -> None:
        """Nothing is open."""


class TorchPeers:
    """start_s: for all nodes to meet. timeout_s: silence after which a peer is lost; on_lost(node, reason) is called
    once for it, from a thread of the peers'."""

    def __init__(
        self,
        topology: Topology,
        interface: str,
        start_s: float,
        timeout_s: float,
        on_lost: Callable[[int, str], None],
    ) -> None:
        self.node = topology.node
        self.num_nodes = topology.num_nodes
        self._start_s = start_s
        self._timeout_s = timeout_s
        self._interface = interface
        self._on_lost = on_lost
        self._is_started = False
        self._handlers: dict[str, Handler] = {_PING: lambda _node, _payload: b""}
        self._outboxes: dict[int, SimpleQueue[tuple[str, bytes] | None]] = {
            node: SimpleQueue() for node in range(topology.num_nodes) if node != topology.node
        }
        self._senders = [
            threading.Thread(target=self._send_to, args=(node,), name=f"peer-{node}", daemon=True)
            for node in self._outboxes
        ]

    def register(self, handler_name: str, handler: Handler) -> None:
        self._handlers[handler_name] = handler

    def start(self) -> None:
        global _serving
        import torch.distributed.rpc as rpc

        for variable in ("TP_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):  # RPC makes a gloo group of its own
            os.environ.setdefault(variable, self._interface)
        _serving = self._handlers
        self._rpc: Any = rpc
        options = rpc.TensorPipeRpcBackendOptions(
            num_worker_threads=_THREADS, rpc_timeout=self._start_s, init_method=_meeting(self._start_s)
        )
        with warnings.catch_warnings():
            # torch's own use of a function it has deprecated.
            warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
            rpc.constants.DEFAULT_PROCESS_GROUP_TIMEOUT = timedelta(
                seconds=self._start_s
            )  # of the gloo group; 30 minutes
            try:
                rpc.init_rpc(_name(self.node), rank=self.node, world_size=self.num_nodes, rpc_backend_options=options)
            except (RuntimeError, TimeoutError) as error:
                text = f"node {self.node}: the {self.num_nodes} nodes have not met in {self._start_s:.0f} s: {error}"
                raise TimeoutError(text) from error
        self._is_started = True
        for sender in self._senders:
            sender.start()

    def ask(self, node: int, handler_name: str, payload: bytes, timeout_s: float) -> Future[bytes]:
        if node == self.node:
            return _completed(self._handlers[handler_name], node, payload)
        answer: Future[bytes] = Future()

        def settle(done: Any) -> None:
            try:
                answer.set_result(done.value())
            except Exception as error:  # RPC raises RuntimeError for all of: unreachable, too slow, the handler's own
                answer.set_exception(ConnectionError(f"node {node}, {handler_name}: {error}"))

        arguments = (handler_name, self.node, payload)
        try:
            self._rpc.rpc_async(_name(node), _serve, arguments, timeout=timeout_s).add_done_callback(settle)
        except RuntimeError as error:
            answer.set_exception(ConnectionError(f"node {node}, {handler_name}: {error}"))
        return answer

    def call(self, node: int, handler_name: str, payload: bytes, timeout_s: float) -> bytes:
        return self.ask(node, handler_name, payload, timeout_s).result()

    def post(self, node: int, handler_name: str, payload: bytes) -> None:
        if node == self.node:
            self._handlers[handler_name](node, payload)
        else:
            self._outboxes[node].put((handler_name, payload))

    def broadcast(self, handler_name: str, payload: bytes) -> None:
        for outbox in self._outboxes.values():
            outbox.put((handler_name, payload))

    def close(self, is_orderly: bool) -> None:
        if not self._is_started:
            return
        for outbox in self._outboxes.values():
            outbox.put(None)
        for sender in self._senders:
            sender.join(_CLOSE_S)
        try:
            self._rpc.shutdown(graceful=is_orderly, timeout=_CLOSE_S)
        except RuntimeError:  # somebody did not wait
            self._rpc.shutdown(graceful=False)

    def _send_to(self, node: int) -> None:
        """One post after the other, and a heartbeat when there is none for a while."""
        outbox = self._outboxes[node]
        while True:
            try:
                post = outbox.get(timeout=_HEARTBEAT_S)
            except Empty:
                post = (_PING, b"")
            if post is None:
                return
            try:
                self.call(node, *post, timeout_s=self._timeout_s)
            except ConnectionError as error:
                self._on_lost(node, str(error).splitlines()[0])
                return


_serving: dict[str, Handler] = {}
"""RPC calls functions by name, so that what they reach is the module's. One set of peers a process."""


def _serve(handler_name: str, source: int, payload: bytes) -> bytes:
    return _serving[handler_name](source, payload)


def _meeting(start_s: float) -> str:
    """Where RPC's processes meet, as an init_method: in torchrun's own store, under keys of this start alone."""
    _register_meeting()
    return f"{_SCHEME}://{start_s}"


@functools.cache
def _register_meeting() -> None:
    from torch.distributed import PrefixStore, register_rendezvous_handler, rendezvous

    def meet(url: str, **kwargs: Any) -> Iterator[tuple[Any, int, int]]:
        """url: with rank and world size behind a question mark; env:// finds torchrun's store, and the same two."""
        for store, rank, world_size in rendezvous("env://", **kwargs):
            name = name_of_start(store, rank, world_size, timeout_s=float(urlparse(url).netloc))
            yield PrefixStore(name, store), rank, world_size

    register_rendezvous_handler(_SCHEME, meet)


def _name(node: int) -> str:
    return f"node{node}"


def _completed(handler: Handler, source: int, payload: bytes) -> Future[bytes]:
    answer: Future[bytes] = Future()
    try:
        answer.set_result(handler(source, payload))
    except Exception as error:  # handed to the asker, as over a wire
        answer.set_exception(error)
    return answer
