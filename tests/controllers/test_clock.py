"""The controller's end of the clock, spoken to by the queue's own RemoteClock over real sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from controllers.clock import ClockService
from controllers.peers import Alone
from controllers.settings import QueueSettings
from transfer_queue.clock import RemoteClock
from transfer_queue.clock_messages import ClockState, decode_clock_answer

_TIMEOUT_MS = 5000


class Shard:
    """As much of a shard as speaks with the clock."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.clock = RemoteClock(endpoint, name)
        self.granted: list[int] = []
        self.num_changes = 0
        self.clock.on_change = self._note_change
        self.clock.enter()
        self.hear()

    def admit(self, deadline: int, rows: int, groups: int) -> int:
        self.clock.admit(deadline, rows, groups, self.granted.append)
        while not self.granted:
            self.hear()
        return self.granted.pop()

    def hear(self) -> None:
        assert self.clock.socket is not None
        assert self.clock.socket.poll(_TIMEOUT_MS), "the clock says nothing"
        self.clock.receive()

    def _note_change(self) -> None:
        self.num_changes += 1


@pytest.fixture
def failures() -> SimpleQueue[str]:
    return SimpleQueue()


@pytest.fixture
def endpoint(tmp_path: Path, failures: SimpleQueue[str]) -> Iterator[str]:
    address = f"ipc://{tmp_path}/clock"
    service = ClockService(address, Alone(), QueueSettings(batch_rows=4, max_staleness=1), 5.0, failures.put)
    service.start()
    yield address
    service.close()


def test_two_shards_draw_on_one_account(endpoint: str) -> None:
    first, second = Shard(endpoint, "first"), Shard(endpoint, "second")
    assert (first.clock.batch_rows, first.clock.max_staleness) == (4, 1)
    assert first.admit(deadline=1, rows=2, groups=3) == 3
    assert second.admit(deadline=1, rows=2, groups=3) == 1, "eight rows are all there is room for"
    assert first.admit(deadline=1, rows=2, groups=1) == 0
    first.clock.close()
    second.clock.close()


def test_refused_shard_is_told_when_another_gives_back(endpoint: str) -> None:
    first, second = Shard(endpoint, "first"), Shard(endpoint, "second")
    assert first.admit(deadline=1, rows=2, groups=4) == 4
    assert second.admit(deadline=1, rows=2, groups=1) == 0
    before = second.num_changes
    first.clock.retire([(1, 2)])
    second.hear()
    assert second.num_changes == before + 1
    assert second.admit(deadline=1, rows=2, groups=1) == 1
    first.clock.close()
    second.clock.close()


class Listener(Alone):
    """Two nodes, of which the other only hears."""

    num_nodes = 2

    def __init__(self) -> None:
        super().__init__()
        self.heard: list[ClockState] = []

    def broadcast(self, handler_name: str, payload: bytes) -> None:
        told = decode_clock_answer(payload)
        assert isinstance(told, ClockState)
        self.heard.append(told)


def test_other_nodes_hear_of_a_version_at_once_and_of_its_many_changes_in_few_words(tmp_path: Path) -> None:
    other, failures = Listener(), SimpleQueue[str]()
    address = f"ipc://{tmp_path}/clock"
    service = ClockService(address, other, QueueSettings(batch_rows=4, max_staleness=1), 5.0, failures.put)
    service.start()
    shard = Shard(address, "only")
    for version in range(4):
        assert shard.admit(deadline=version, rows=4, groups=1) == 1
        shard.clock.claim(version, 0, [(version, 4)], False, shard.granted.append)
        while not shard.granted:
            shard.hear()
        shard.granted.clear()
        time.sleep(0.1)
        assert other.heard[-1].version == version + 1
    before = len(other.heard)
    for _ in range(200):
        assert shard.admit(deadline=4, rows=4, groups=1) == 1
        shard.clock.retire([(4, 4)])
    time.sleep(0.1)
    service.close()
    shard.clock.close()
    assert failures.empty()
    assert len(other.heard) - before < 60, "there were 200 changes"
    assert other.heard[-1].changes == 204, "the last one is told"


def test_broken_account_is_a_failure_with_a_name(endpoint: str, failures: SimpleQueue[str]) -> None:
    shard = Shard(endpoint, "first")
    shard.clock.retire([(1, 2)])
    assert "clock of node 0: AssertionError('2 rows due 1 leave the account" in failures.get(timeout=5)
    shard.clock.close()
