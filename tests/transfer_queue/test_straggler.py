"""One straggler among short tasks, in simulated time, through the production shard."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from transfer_queue import wire

BATCH_ROWS = 4
CONCURRENCY = 16
STRAGGLER_TICKS = 20


@dataclass
class Simulation:
    """Every tick: running tasks advance, finished ones are put, free slots are filled, the trainer takes what it gets.
    Group 0 is the straggler, on its first attempt."""

    shard: Any
    running: dict[tuple[int, int], tuple[wire.Reservation, int]] = field(default_factory=dict)
    version: int = 0
    filled_at: list[int] = field(default_factory=list)
    lags: list[int] = field(default_factory=list)
    straggler_update: int | None = None

    def run(self, ticks: int) -> None:
        for tick in range(ticks):
            self.shard.announce("p", self.version)
            self._start_tasks(tick)
            self._finish_tasks(tick)
            self._train(tick)

    def _start_tasks(self, tick: int) -> None:
        for group in self.shard.reserve(groups=CONCURRENCY - len(self.running)) if len(self.running) < 16 else []:
            ticks = STRAGGLER_TICKS if (group.group, group.attempt) == (0, 0) else 1
            self.running[group.group, group.attempt] = (group, tick + ticks)

    def _finish_tasks(self, tick: int) -> None:
        for name, (group, ends) in list(self.running.items()):
            if ends <= tick + 1:
                del self.running[name]
                for column in ("tokens", "reward", "advantage"):
                    self.shard.put(group.keys, (column,), [group.version] if column == "tokens" else [])

    def _train(self, tick: int) -> None:
        while True:
            taken = self.shard.take("train", BATCH_ROWS, update=self.version)
            self.lags += [self.version - version for version in taken.versions]
            if any(key.group == 0 for key in taken.keys):
                self.straggler_update = self.version
            if taken.closed:
                self.version += 1
                self.filled_at.append(tick)
            elif not taken.keys:
                return


def simulate(direct_shard: Callable[..., Any], max_staleness: int, late: str) -> Simulation:
    simulation = Simulation(direct_shard(batch_rows=BATCH_ROWS, max_staleness=max_staleness, late=late))
    simulation.run(60)
    return simulation


@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_waiting_for_a_straggler_holds_up_the_update_of_its_deadline_alone(
    direct_shard: Callable[..., Any], max_staleness: int
) -> None:
    simulation = simulate(direct_shard, max_staleness, "wait")
    assert max(simulation.lags) <= max_staleness
    assert simulation.straggler_update == max_staleness, "it is trained in the last update it may be in"
    before = [tick for tick in simulation.filled_at if tick < STRAGGLER_TICKS - 1]
    assert len(before) == max_staleness, "all earlier updates fill without it"
    assert simulation.filled_at[max_staleness] == STRAGGLER_TICKS - 1
    assert simulation.version > 40, "afterwards an update a tick"


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_dropping_a_straggler_costs_no_tick(direct_shard: Callable[..., Any], max_staleness: int) -> None:
    simulation = simulate(direct_shard, max_staleness, "drop")
    assert max(simulation.lags) <= max_staleness
    assert simulation.straggler_update is not None, "its prompt was tried again"
    assert simulation.version >= 59
    ended = simulation.shard.shard.describe()["ended"]
    assert ended == {"late": 1}


def test_nothing_is_late_in_a_synchronous_run(direct_shard: Callable[..., Any]) -> None:
    simulation = simulate(direct_shard, 0, "drop")
    assert simulation.shard.shard.describe()["ended"] == {}
    assert set(simulation.lags) == {0}
