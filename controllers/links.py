"""A node's links to the other nodes: what it tells them, and what it hears, handed on in the controller's own loop.

Owns the peers and all that is exchanged among nodes except the clock. On one node everything here is trivial, and torch
is not imported.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, Protocol

import msgspec

from controllers.lifecycle import Session
from controllers.mailbox import Mailbox
from controllers.messages import Announcement, Report
from controllers.peers import Alone, Peers, TorchPeers
from controllers.placement import WorkerPlan, fingerprint
from controllers.rendezvous import Rendezvous
from controllers.roster import Card, Roster, host_name, installed_versions
from controllers.settings import ControllerSettings
from controllers.topology import Topology

_LOOPBACK = "lo"
_RENDEZVOUS_TIMEOUT_S = 30.0


class NodeEnd(msgspec.Struct, frozen=True, tag=True):
    """A node ends the run. code: its exit code."""

    code: int
    reason: str

    @property
    def is_in_order(self) -> bool:
        """By itself, or because somebody wanted it to."""
        return self.code != 1


class Shard(msgspec.Struct, frozen=True, tag=True):
    """A node's shard of the queue is ready. endpoint: empty if the run has no queue."""

    endpoint: str


class RemoteReport(msgspec.Struct, frozen=True, tag=True):
    worker: str
    report: Report


class Gone(msgspec.Struct, frozen=True, tag=True):
    """A node's workers have stopped; it needs nothing more."""


_Word = NodeEnd | Shard | RemoteReport | Gone | Announcement
_decode = msgspec.msgpack.Decoder(_Word).decode
_encode = msgspec.msgpack.Encoder().encode
_HANDLER = "links/word"


class Hearer(Protocol):
    """What the controller hears of other nodes, in its own thread."""

    def on_announcement(self, announcement: Announcement) -> None: ...

    def on_report(self, worker: str, report: Report) -> None: ...

    def on_end(self, node: int, end: NodeEnd) -> None: ...

    def on_lost_node(self, node: int, reason: str) -> None: ...

    def on_all_shards(self) -> None:
        """`queue_endpoints` is complete."""
        ...


class Links:
    """Everything but `open` and `close` is called in the controller's thread."""

    def __init__(
        self,
        topology: Topology,
        settings: ControllerSettings,
        plans: Sequence[WorkerPlan],
        mailbox: Mailbox,
        hearer: Hearer,
    ) -> None:
        self._topology = topology
        self._settings = settings
        self._mailbox = mailbox
        self._hearer = hearer
        self._rank_zero = {plan.worker: plan.node for plan in plans if plan.rank == 0}
        self._shards: dict[int, str] = {}
        self._gone = {topology.node}
        self._has_lost = False
        self._rendezvous = Rendezvous(settings.address)
        self.peers: Peers = self._make_peers()
        self.peers.register(_HANDLER, self._receive)
        self.peers.register("links/port", lambda _node, name: str(self._rendezvous.port(name.decode())).encode())
        self._roster = Roster(self.peers, self._card(plans))
        self.secret = ""
        self.life = 0
        self.restore_from = ""

    def open(self) -> None:
        """Waits for all nodes and compares them. Raises TimeoutError or ValueError, naming the node."""
        self.peers.start()
        self._cards = self._roster.gather(self._settings.start_s)
        self.secret = self._cards[0].secret
        self.life = self._cards[0].life
        self.restore_from = self._cards[0].restore_from

    def close(self) -> None:
        self.peers.close(is_orderly=self.is_everybody_gone and not self._has_lost)

    def shard_endpoint(self, session: Session) -> str:
        """Where this node's shard binds: a socket file, if all nodes are on this machine."""
        return session.endpoint("queue") if self._topology.is_on_one_host else f"tcp://{self._settings.address}:*"

    @property
    def queue_endpoints(self) -> tuple[str, ...]:
        """This node's first, then those of the nodes after it."""
        first = self._topology.node
        nodes = [(first + step) % self._topology.num_nodes for step in range(self._topology.num_nodes)]
        return tuple(self._shards[node] for node in nodes if self._shards[node])

    @property
    def is_everybody_gone(self) -> bool:
        return len(self._gone) == self._topology.num_nodes

    def tell_shard(self, endpoint: str) -> None:
        self._broadcast(Shard(endpoint))
        self._add_shard(self._topology.node, endpoint)

    def tell_announcement(self, announcement: Announcement) -> None:
        self._broadcast(announcement)

    def tell_report(self, worker: str, report: Report) -> None:
        """Node 0 keeps the record of the run."""
        if self._topology.node != 0:
            self.peers.post(0, _HANDLER, _encode(RemoteReport(worker, report)))

    def tell_end(self, end: NodeEnd) -> None:
        self._broadcast(end)

    def tell_gone(self) -> None:
        self._broadcast(Gone())

    def find_port(self, worker: str, name: str, answer: Callable[[dict[str, Any], str], None]) -> None:
        """Calls answer(result, error) in the controller's thread: where rank 0 of this kind of worker can listen."""
        node = self._rank_zero[worker]

        def settle(port: Future[bytes]) -> None:
            error = port.exception()
            if error is None:
                result = {"host": self._cards[node].address, "port": int(port.result())}
                self._mailbox.post(partial(answer, result, ""))
            else:
                self._mailbox.post(partial(answer, {}, str(error)))

        self.peers.ask(node, "links/port", name.encode(), _RENDEZVOUS_TIMEOUT_S).add_done_callback(settle)

    def _make_peers(self) -> Peers:
        if self._topology.num_nodes == 1:
            return Alone()

        def on_lost(node: int, reason: str) -> None:
            self._mailbox.post(partial(self._lose, node, reason))

        settings = self._settings
        is_exposed = settings.interface != _LOOPBACK or not self._topology.is_on_one_host
        if is_exposed and not settings.is_trusted:
            raise ValueError(
                f"network.trusted: false; several nodes speak by torch RPC, which has no secret, over "
                f"{settings.interface!r}: set it to true if nobody else can reach that network"
            )
        return TorchPeers(self._topology, settings.interface, settings.start_s, settings.peer_s, on_lost)

    def _card(self, plans: Sequence[WorkerPlan]) -> Card:
        return Card(
            node=self._topology.node,
            host=host_name(),
            address=self._settings.address,
            plan=f"{fingerprint(plans)}{self._settings.recipe}",
            versions={**installed_versions(), **self._settings.versions} if self._topology.num_nodes > 1 else {},
            life=self._settings.life,
            restore_from=self._settings.restore_from,
            secret="" if self._topology.is_on_one_host else secrets.token_hex(32),
        )

    def _broadcast(self, word: _Word) -> None:
        self.peers.broadcast(_HANDLER, _encode(word))

    def _receive(self, node: int, payload: bytes) -> bytes:
        word = _decode(payload)
        self._mailbox.post(partial(self._hear, node, word))
        return b""

    def _hear(self, node: int, word: _Word) -> None:
        if isinstance(word, Announcement):
            self._hearer.on_announcement(word)
        elif isinstance(word, RemoteReport):
            self._hearer.on_report(word.worker, word.report)
        elif isinstance(word, NodeEnd):
            self._hearer.on_end(node, word)
        elif isinstance(word, Shard):
            self._add_shard(node, word.endpoint)
        else:
            self._gone.add(node)

    def _add_shard(self, node: int, endpoint: str) -> None:
        self._shards[node] = endpoint
        if len(self._shards) == self._topology.num_nodes:
            self._hearer.on_all_shards()

    def _lose(self, node: int, reason: str) -> None:
        if node not in self._gone:
            self._gone.add(node)
            self._has_lost = True
            self._hearer.on_lost_node(node, f"node {node} ({self._cards[node].host}) is lost: {reason}")
