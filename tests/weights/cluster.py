"""Nodes with relays in threads of one process, real sockets between them; the test plays the trainer's ranks."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from flowrl.weights.buffers import Buffer
from flowrl.weights.pool import BufferPool
from flowrl.weights.progress import Progress
from flowrl.weights.relay import Relay
from flowrl.weights.slices import Holdings
from flowrl.weights.store import WeightStore
from flowrl.weights.tensorfile import WEIGHTS_FILE

NUM_BYTES = 300_000
SLICE = 16_384
RNG = np.random.default_rng(0)


class File:
    file_name = WEIGHTS_FILE
    header = b""
    num_bytes = NUM_BYTES


class Node:
    """A node with a relay in a thread. ranges: what its trainer ranks write, if it has any."""

    def __init__(
        self,
        root: Path,
        number: int,
        holdings: Holdings,
        serving: list[int],
        is_late: bool,
        buffers: int,
        **settings: object,
    ) -> None:
        self.number = number
        self.ranges = holdings.ranges.get(number)
        self.store = WeightStore(root / f"{number}", buffers)
        is_whole = len(holdings.ranges) == 1
        self.written = self.store if is_whole else WeightStore(root / f"{number}-written", buffers)
        self.all: list[Node] = []
        self.pool = BufferPool(self.written, File(), [], self.tell) if self.ranges else None
        self.progress: Progress | None = None
        self.shown: list[int] = []
        self.error: Exception | None = None
        self.relay = Relay(
            node=number,
            serving=serving,
            store=self.store,
            written=self.written if self.ranges else None,
            companions=[],
            bind=f"ipc://{root}/relay-{number}",
            on_published=lambda version, path: self.shown.append(version),
            **settings,  # type: ignore[arg-type]
        )
        if not is_late:
            self.relay.hold(holdings)
        self.thread = threading.Thread(target=self.run, daemon=True)

    def tell(self, version: int, path: Path) -> None:
        """As the trainer announces a version that can be read."""
        for node in self.all:
            node.relay.written(self.number, version)

    def run(self) -> None:
        try:
            self.relay.run()
        except Exception as error:
            self.error = error

    def write(self, version: int, data: np.ndarray) -> None:
        """All of it, before anybody hears of it."""
        assert self.pool is not None
        buffer = self.pool.begin()
        self.put(buffer, data, 0, NUM_BYTES)
        self.pool.commit(buffer, version, "")

    def put(self, buffer: Buffer, data: np.ndarray, first: int, last: int) -> None:
        """The node's part of bytes [first, last)."""
        assert self.ranges is not None
        file = buffer.bytes.numpy()
        for begin, end in self.ranges:
            chosen = slice(max(begin, first), min(end, last))
            file[chosen] = data[chosen]

    def begin(self, version: int) -> Buffer:
        """As the trainer announces a version that it begins to write."""
        assert self.pool is not None
        if self.progress is None:
            self.progress = Progress(self.written.root, 0)
        self.progress.begin(version)
        buffer = self.pool.begin()
        for node in self.all:
            node.relay.begun(self.number, version, buffer.path)
        return buffer

    def write_up_to(self, buffer: Buffer, data: np.ndarray, first: int, last: int) -> None:
        """From `first` to `last`, where all that comes before is written."""
        assert self.progress is not None
        self.put(buffer, data, first, last)
        self.progress.reach(last)

    def fail(self, buffer: Buffer, version: int) -> None:
        assert self.pool is not None
        self.pool.abandon(buffer)
        for node in self.all:
            node.relay.failed(self.number, version)

    def read(self, version: int) -> bytes:
        return (self.store.path(version) / WEIGHTS_FILE).read_bytes()


@contextmanager
def cluster(
    root: Path, holdings: Holdings, num_nodes: int, late: tuple[int, ...] = (), buffers: int = 3, **settings: object
) -> Iterator[list[Node]]:
    """Short paths: sockets have room for 107 characters. late: nodes that are not told yet who holds what."""
    whole = Holdings.slices
    patch = pytest.MonkeyPatch()
    patch.setattr(Holdings, "slices", lambda self: whole(self, SLICE))
    serving = list(range(num_nodes))
    nodes = [Node(root, number, holdings, serving, number in late, buffers, **settings) for number in serving]
    for node in nodes:
        node.all = nodes
        for other in nodes:
            node.relay.connect(other.number, other.relay.endpoint)
        node.thread.start()
    try:
        yield nodes
    finally:
        for node in nodes:
            node.relay.stop()
            node.thread.join(20)
            if node.pool is not None:
                node.pool.close()
            if node.progress is not None:
                node.progress.close()
            assert not node.thread.is_alive()
        patch.undo()


def publish(nodes: list[Node], version: int, data: np.ndarray) -> None:
    for node in nodes:
        if node.ranges:
            node.write(version, data)


def wait_for(nodes: list[Node], version: int) -> None:
    deadline = time.monotonic() + 30
    for node in nodes:
        while version not in node.shown:
            assert node.error is None, node.error
            assert time.monotonic() < deadline, f"node {node.number} has {node.shown}, not {version}"
            time.sleep(0.002)


def random_bytes() -> np.ndarray:
    return RNG.integers(0, 256, NUM_BYTES, dtype=np.uint8)


def slightly_changed(data: np.ndarray) -> np.ndarray:
    """One low byte in a hundred words of two, as a small learning rate leaves bfloat16."""
    changed = data.copy()
    changed[RNG.choice(NUM_BYTES // 2, NUM_BYTES // 200, replace=False) * 2] ^= 1
    return changed


WHOLE = Holdings.of([0], [[(0, NUM_BYTES)]], NUM_BYTES)
PARTS = Holdings.of([0, 1], [[(0, 70_001), (200_000, NUM_BYTES)], [(70_001, 200_000)]], NUM_BYTES)
