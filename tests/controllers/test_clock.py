"""The controller's end of the clock, spoken to by the queue's own RemoteClock over real sockets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest

from controllers.clock import ClockService
from controllers.peers import Alone
from controllers.settings import QueueSettings
from transfer_queue.clock import RemoteClock

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


def test_broken_account_is_a_failure_with_a_name(endpoint: str, failures: SimpleQueue[str]) -> None:
    shard = Shard(endpoint, "first")
    shard.clock.retire([(1, 2)])
    assert "clock of node 0: AssertionError('2 rows due 1 leave the account" in failures.get(timeout=5)
    shard.clock.close()
