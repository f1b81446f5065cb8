"""A shard without sockets, a shard on a socket, and both faces of the client under one name."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from transfer_queue import wire
from transfer_queue.async_client import AsyncQueueClient
from transfer_queue.client import QueueClient
from transfer_queue.clock import Clock, LocalClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.core import Columns
from transfer_queue.rows import Column, RowKey
from transfer_queue.server import QueueServer
from transfer_queue.shard import Shard
from transfer_queue.spans import spans_of
from transfer_queue.staleness import Accounts

CONSUMERS = {
    "reward": ConsumerSpec(columns=("tokens",)),
    "advantage": ConsumerSpec(columns=("reward",), unit="group"),
    "train": ConsumerSpec(columns=("tokens", "advantage"), training=True),
}
NO_COLUMNS: Columns = MappingProxyType({})


def as_travels(field: Any) -> Any:
    """Keys as the spans that go over the wire."""
    is_list = isinstance(field, Sequence) and not isinstance(field, str)
    are_keys = is_list and len(field) > 0 and all(isinstance(key, RowKey) for key in field)
    return spans_of(field) if are_keys else field


class DirectShard:
    """Calls a shard as a server would, with a time that the test sets. Peers in `gone` do not get their answers."""

    def __init__(self, config: QueueConfig, clock: Clock) -> None:
        self.now = 0.0
        self.num_asked = 0
        self.gone: set[bytes] = set()
        self.events: list[tuple[str, RowKey, dict[str, Any]]] = []
        self.answers: dict[tuple[bytes, int], tuple[wire.Message, Columns]] = {}
        self.clock = clock
        self.shard = Shard(config, clock, self._send, lambda *event: self.events.append(event))
        self._ids = iter(range(1, 1 << 30))

    @property
    def ledger(self) -> Any:
        return self.shard._core.ledger

    def ask(
        self, make: Callable[..., wire.Message], *fields: Any, peer: bytes = b"peer", columns: Columns = NO_COLUMNS
    ) -> Any:
        """The answer, or the number of the request if it is parked."""
        number = next(self._ids)
        self.num_asked += 1
        self.shard.handle(peer, make(number, *map(as_travels, fields)), columns, self.now)
        self.clock.receive()
        self.shard.settle(self.now)
        return self.answers.pop((peer, number))[0] if (peer, number) in self.answers else number

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.clock.receive()
        self.shard.settle(self.now)

    def answer_to(self, number: int, peer: bytes = b"peer") -> Any:
        self.clock.receive()
        self.shard.settle(self.now)
        return self.answers.pop((peer, number), (None, {}))[0]

    def announce(self, producer: str, version: int) -> Any:
        return self.ask(wire.Announce, producer, version)

    def reserve(self, producer: str = "p", groups: int = 1, size: int = 1, wait_s: float = 0.0, **more: Any) -> Any:
        partition, row_bytes = more.pop("partition", "train"), more.pop("row_bytes", 0)
        answer = self.ask(wire.Reserve, producer, groups, size, partition, row_bytes, wait_s, **more)
        return answer.groups if isinstance(answer, wire.Reserved) else answer

    def put(self, keys: Any, names: tuple[str, ...] = ("tokens",), versions: Any = (), value: float = 0.0) -> Any:
        columns = {name: Column.scalars([value] * len(keys), "float32") for name in names}
        return self.ask(wire.Put, list(keys), [], list(versions), columns=columns)

    def take(
        self, consumer: str, max_rows: int = 1, update: int | None = None, wait_s: float = 0.0, **more: Any
    ) -> Any:
        return self.ask(wire.Take, consumer, max_rows, None, update, more.pop("incarnation", 0), wait_s, **more)

    def _send(self, peer: bytes, reply: wire.Message, columns: Columns) -> bool:
        if peer in self.gone:
            return False
        self.answers[peer, reply.id] = (reply, columns)
        return True


@pytest.fixture
def direct_shard() -> Callable[..., DirectShard]:
    def make(
        batch_rows: int = 4, max_staleness: int = 0, accounts: Accounts | None = None, **config: Any
    ) -> DirectShard:
        settings: dict[str, Any] = {"endpoint": "ipc://unused", "consumers": CONSUMERS, **config}
        clock = LocalClock(accounts or Accounts(batch_rows, max_staleness))
        return DirectShard(QueueConfig(**settings), clock)

    return make


class AwaitedClient:
    """AsyncQueueClient with the signatures of QueueClient, so that one test runs against both."""

    def __init__(self, loop: asyncio.AbstractEventLoop, client: AsyncQueueClient) -> None:
        self._loop = loop
        self._client = client

    def __getattr__(self, verb: str) -> Callable[..., Any]:
        return lambda *args, **kwargs: self._loop.run_until_complete(getattr(self._client, verb)(*args, **kwargs))


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., QueueServer]]:
    """Starts shards, each in a thread of its own."""
    with ExitStack() as stack:

        def start(clock: Clock | None = None, name: str = "shard", **config: Any) -> QueueServer:
            settings: dict[str, Any] = {"endpoint": f"ipc://{tmp_path}/{name}", "consumers": CONSUMERS, **config}
            server = QueueServer(QueueConfig(**settings), clock or LocalClock(Accounts(4, 0)))
            thread = threading.Thread(target=server.serve)
            thread.start()
            stack.callback(server.close)
            stack.callback(thread.join, 10)
            stack.callback(server.stop)
            return server

        yield start


@pytest.fixture(params=["blocking", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    """A client of either face."""
    loop = asyncio.new_event_loop()
    with ExitStack() as stack:
        stack.callback(loop.close)

        def start(endpoints: str | list[str], **settings: Any) -> Any:
            if request.param == "blocking":
                client: Any = QueueClient(endpoints, **settings)
            else:
                client = AwaitedClient(loop, AsyncQueueClient(endpoints, **settings))
            stack.callback(client.close)
            return client

        yield start


def keys_of(groups: list[wire.Reservation]) -> list[RowKey]:
    return [key for group in groups for key in group.keys]


def fill(shard: Any, groups: list[wire.Reservation]) -> list[RowKey]:
    """All that rollout, reward and advantage write."""
    keys = keys_of(groups)
    shard.put(keys, ("tokens",), [group.version for group in groups for _ in group.keys])
    shard.put(keys, ("reward",))
    shard.put(keys, ("advantage",))
    return keys
