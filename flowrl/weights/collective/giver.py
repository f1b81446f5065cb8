"""A trainer rank's end: a thread for each engine, which gives it the versions that it asks for.

A thread whose engine is lost or silent says so, lets go of what it held, and ends; training goes on. The engine that is
started in its place announces itself anew and gets a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from typing import Any

import msgspec
import torch
import xxhash
import zmq

from flowrl.weights.collective.group import Group, PeerLost, join_store
from flowrl.weights.collective.rounds import Rounds
from flowrl.weights.collective.staging import Staged, Staging
from flowrl.weights.collective.wire import Done, EngineNews, Go, Hello, Open, Opened, decode_to_rank, encode
from transfer_queue.security import secure_client

logger = logging.getLogger(__name__)

_POLL_MS = 100
_FAREWELL_S = 5.0


@dataclass(frozen=True)
class Terms:
    """Of all transfers. secret: for CURVE, none on one host. timeout_s: silence that makes a peer lost."""

    device: torch.device
    secret: str
    timeout_s: float


class Giver:
    """hello: what this rank sends; streams: the lengths that all ranks send."""

    def __init__(self, hello: Hello, staging: Staging, terms: Terms) -> None:
        self._hello = hello
        self._staging = staging
        self._terms = terms
        self._context = zmq.Context()
        self._links: dict[str, tuple[threading.Thread, threading.Event]] = {}
        self._lock = threading.Lock()

    def meet(self, payload: dict[str, Any]) -> None:
        """An engine has announced itself; one of its name before has gone. Any thread; returns at once."""
        news = msgspec.convert(payload, EngineNews)
        ends = threading.Event()
        thread = threading.Thread(target=self._serve, args=(news, ends), name=f"give-{news.name}", daemon=True)
        with self._lock:
            if news.name in self._links:
                self._links[news.name][1].set()
            self._links[news.name] = thread, ends
        thread.start()

    def close(self) -> None:
        with self._lock:
            links = list(self._links.values())
            self._links.clear()
        for _, ends in links:
            ends.set()
        for thread, _ in links:
            thread.join(self._terms.timeout_s)
        self._context.term()

    def _serve(self, news: EngineNews, ends: threading.Event) -> None:
        socket = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.IDENTITY, str(self._hello.rank).encode())
        if self._terms.secret:
            secure_client(socket, self._terms.secret)
        group = None
        try:
            socket.connect(news.endpoint)
            socket.send(encode(self._hello))
            group = self._join(news)
            _Link(news, self._hello, group, socket, self._staging, self._terms, ends).serve()
        except PeerLost as error:
            logger.warning("weights: engine %s gets no more from rank %d: %s", news.name, self._hello.rank, error)
        finally:
            socket.close()
            if group is not None:
                group.close()

    def _join(self, news: EngineNews) -> Group:
        size = self._hello.num_ranks + 1
        if self._terms.device.type == "cuda":
            torch.cuda.set_device(self._terms.device)  # of this thread
        store = join_store(news.store, size, self._terms.timeout_s)
        return Group(news.group, store, self._hello.rank + 1, size, self._terms.device, self._terms.timeout_s)


class _Link:
    """One engine, as long as it is there."""

    def __init__(
        self,
        news: EngineNews,
        hello: Hello,
        group: Group,
        socket: zmq.Socket[bytes],
        staging: Staging,
        terms: Terms,
        ends: threading.Event,
    ) -> None:
        self._name = f"engine {news.name}"
        self._group = group
        self._socket = socket
        self._staging = staging
        self._terms = terms
        self._ends = ends
        # A rank's parts depend on how many ranks there are, and not on what the others send.
        everyone = [[] if rank != hello.rank else hello.ranges for rank in range(hello.num_ranks)]
        self._rounds = Rounds(everyone, news.bucket_bytes)
        self._rank = hello.rank

    def serve(self) -> None:
        while not self._ends.is_set():
            if not self._socket.poll(_POLL_MS):
                continue
            question = decode_to_rank(self._socket.recv())
            if isinstance(question, Open):
                staged = self._staging.hold(question.version, self._ends.is_set)
                digest = _digest(staged.bytes) if staged is not None and question.digest else 0
                self._socket.send(encode(Opened(question.version, staged is not None, digest)))
                if staged is not None:
                    self._give(staged)

    def _give(self, staged: Staged) -> None:
        version = staged.version
        try:
            question = self._next()
            if isinstance(question, Go):
                for round_ in range(self._rounds.count):
                    begin, end = self._rounds.part(self._rank, round_)
                    if begin < end:
                        self._group.send(staged.bytes[begin:end], 0, f"{self._name}, taking version {version},")
                question = self._next()
            assert isinstance(question, Done), f"{question} where the end was to come"
        finally:
            self._staging.let_go(staged)

    def _next(self) -> Open | Go | Done:
        """Raises PeerLost if nothing comes. A transfer is not broken off because the end has come in the middle of it,
        nor waited for long because of an engine that has died and been started again."""
        started = time.monotonic()
        while not self._socket.poll(_POLL_MS):
            limit_s = min(_FAREWELL_S, self._terms.timeout_s) if self._ends.is_set() else self._terms.timeout_s
            if time.monotonic() > started + limit_s:
                raise PeerLost(f"{self._name} holds a version and was silent for {limit_s:.0f} s")
        return decode_to_rank(self._socket.recv())


def _digest(data: torch.Tensor) -> int:
    return xxhash.xxh3_64_intdigest(data.cpu().numpy().data)
