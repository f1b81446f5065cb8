"""The straggler that a gate at admission alone lets through, in every order of consumption, in virtual time."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from flowrl.simulate import Outcome, Setting, simulate
from flowrl.simulate.rules import AdmissionOnly
from transfer_queue.policies import ReadyGroup

BATCH_ROWS = 4
CONCURRENCY = 16
HERE = "tests.transfer_queue.test_strict_staleness"
ORDERS = ["deadline", "freshest", "arrival", f"{HERE}:shuffled", f"{HERE}:last_arrival_first"]


def shuffled(group: ReadyGroup) -> float:
    return random.Random(f"{group.group} {group.attempt}").random()


def last_arrival_first(group: ReadyGroup) -> float:
    return -group.arrival


@dataclass
class OneStraggler:
    """The first task takes 20 ticks, every other one."""

    left: int = 1

    def draw(self, dice: random.Random) -> float:
        self.left -= 1
        return 20.0 if self.left >= 0 else 1.0


def run(max_staleness: int, order: str, late: str = "wait", accounts: AdmissionOnly | None = None) -> Outcome:
    return simulate(
        Setting(
            batch_groups=BATCH_ROWS, max_staleness=max_staleness, late=late, order=order, concurrency=CONCURRENCY,
            durations=OneStraggler(), step_s=0.9, updates=40,
        ),
        accounts,
    )  # fmt: skip


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_staleness", [0, 1, 2, 4])
def test_no_row_is_older_than_the_bound_in_any_order(max_staleness: int, order: str) -> None:
    outcome = run(max_staleness, order)
    assert outcome.max_lag <= max_staleness
    assert outcome.updates == 40
    assert outcome.ended == {}, "waiting drops nothing"


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_dropping_the_straggler_is_counted_and_wins_its_time_back(max_staleness: int, order: str) -> None:
    waiting, dropping = run(max_staleness, order), run(max_staleness, order, late="drop")
    assert dropping.max_lag <= max_staleness
    assert dropping.ended == {"late": 1}
    assert dropping.seconds < waiting.seconds - 10


@pytest.mark.parametrize("max_staleness", [1, 2, 4])
def test_a_gate_at_admission_alone_lets_the_straggler_through(max_staleness: int) -> None:
    outcome = run(max_staleness, "arrival", accounts=AdmissionOnly(BATCH_ROWS, max_staleness))
    assert outcome.max_lag > max_staleness
