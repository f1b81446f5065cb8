"""The queue's promises over histories in virtual time, and what a simulation says of a run.

FLOWRL_TRIALS=2000 draws that many settings; FLOWRL_FIRST_TRIAL says where to begin.
"""

from __future__ import annotations

import os
from collections import Counter

import pytest

from flowrl.simulate import Constant, Deadlock, LogNormal, Measured, Outcome, Setting, simulate
from flowrl.simulate.trials import random_setting
from transfer_queue.staleness import Accounts

NUM_TRIALS = int(os.environ.get("FLOWRL_TRIALS", "24"))
FIRST_TRIAL = int(os.environ.get("FLOWRL_FIRST_TRIAL", "0"))
UPDATES = None if "FLOWRL_TRIALS" in os.environ else 40


@pytest.mark.timeout(0 if NUM_TRIALS > 100 else 120)
def test_no_setting_breaks_the_bound_or_stops() -> None:
    """`simulate` itself asserts: no row too old, none twice, no group split, nothing stuck, every credit back once."""
    kinds: Counter[str] = Counter()
    for seed in range(FIRST_TRIAL, FIRST_TRIAL + NUM_TRIALS):
        outcome = simulate(random_setting(seed, UPDATES))
        kinds.update(outcome.ended)
        kinds["failures"] += outcome.failures
    tested = ("late", "tied", "surplus", "producer_lost", "failures")
    assert min(kinds[kind] for kind in tested) > 0, "they were put to the test"


class NoBoundAtTheTake(Accounts):
    def blocked_at(self, deadline: int, rows: int) -> int | None:
        return None


class CreditsLost(Accounts):
    def retire(self, deadline: int, rows: int) -> None:
        self._change()


@pytest.mark.parametrize("broken", [NoBoundAtTheTake, CreditsLost])
def test_a_broken_rule_is_found(broken: type[Accounts]) -> None:
    def breaks(seed: int) -> bool:
        setting = random_setting(seed, 60)
        assert setting.max_staleness is not None
        try:
            rows, bound = setting.batch_rows, setting.max_staleness
            simulate(setting, broken(rows, bound, surplus_rows=setting.surplus_rows))
        except (Deadlock, AssertionError):
            return True
        return False

    assert any(breaks(seed) for seed in range(60))


def test_the_same_seed_is_the_same_history() -> None:
    setting = Setting(batch_groups=4, engines=2, shards=2, clock_s=0.01, filtered=0.2, failures=0.05, updates=20)
    assert simulate(setting) == simulate(setting)


def test_a_synchronous_run_takes_as_long_as_arithmetic_says() -> None:
    """Every update waits for its responses (2 s), trains (4 rows of 0.25 s, then 1 s), publishes (0.5 s)."""
    outcome = simulate(
        Setting(
            batch_groups=4, max_staleness=0, concurrency=4, durations=Constant(2.0), row_train_s=0.25, step_s=1.0,
            publish_s=0.5, updates=10,
        )
    )  # fmt: skip
    assert outcome.seconds == pytest.approx(10 * (2.0 + 1.0 + 1.0) + 9 * 0.5)
    assert outcome.trainer_idle == pytest.approx((10 * 2.0 + 9 * 0.5) / outcome.seconds)
    assert (outcome.max_lag, outcome.untrained) == (0, 0.0)


@pytest.mark.parametrize(("micro_batch_rows", "busy_s"), [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)])
def test_the_trainer_begins_when_a_micro_batch_is_full(micro_batch_rows: int, busy_s: float) -> None:
    """One response ends each second. What the trainer has not done by the last one comes after it, a second a row."""
    outcome = simulate(
        Setting(
            batch_groups=4, max_staleness=0, concurrency=1, durations=Constant(1.0), row_train_s=1.0,
            micro_batch_rows=micro_batch_rows, updates=10,
        )
    )  # fmt: skip
    assert outcome.seconds == pytest.approx(10 * (4.0 + busy_s))


def test_an_asynchronous_run_is_as_fast_as_its_slower_half() -> None:
    trainer_bound = simulate(
        Setting(batch_groups=4, max_staleness=2, concurrency=16, durations=Constant(1.0), step_s=1.0, updates=40)
    )
    assert trainer_bound.rows_s == pytest.approx(4.0, rel=0.02)
    rollout_bound = simulate(
        Setting(batch_groups=4, max_staleness=2, concurrency=2, durations=Constant(1.0), step_s=0.1, updates=40)
    )
    assert rollout_bound.rows_s == pytest.approx(2.0, rel=0.05)


def test_strictness_costs_what_a_run_without_a_bound_gains_and_drop_wins_part_of_it_back() -> None:
    def rows_s(max_staleness: int | None, late: str = "wait") -> float:
        setting = Setting(
            batch_groups=16, max_staleness=max_staleness, late=late, concurrency=64, durations=LogNormal(1.0, 1.5),
            step_s=0.5, updates=60,
        )  # fmt: skip
        return simulate(setting).rows_s

    waits = [rows_s(bound) for bound in (0, 1, 2, 4)]
    assert waits == sorted(waits), "a wider bound is no slower"
    assert waits[1] < rows_s(1, "drop") <= rows_s(None) * 1.05


def test_surplus_takes_the_stragglers_out_of_a_synchronous_run() -> None:
    def outcome(surplus: int, filtered: float) -> Outcome:
        return simulate(
            Setting(
                batch_groups=16, max_staleness=0, surplus_groups=surplus, concurrency=64, durations=LogNormal(1.0, 1.5),
                filtered=filtered, step_s=0.5, updates=60,
            )
        )  # fmt: skip

    for filtered in (0.0, 0.3):
        without, with_surplus = outcome(0, filtered), outcome(8, filtered)
        assert with_surplus.rows_s > 1.5 * without.rows_s
        assert with_surplus.max_lag == 0 and with_surplus.ended["surplus"] > 0
        assert "surplus" not in without.ended


def test_measured_durations_are_drawn_from_what_was_measured() -> None:
    outcome = simulate(
        Setting(batch_groups=1, max_staleness=0, concurrency=1, durations=Measured([3.0]), updates=5, publish_s=0.0)
    )
    assert outcome.seconds == pytest.approx(15.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("batch_groups", 0), ("concurrency", 0), ("micro_batch_rows", 0), ("step_s", -1.0), ("filtered", 1.0),
        ("max_staleness", -1), ("late", "never"), ("order", "up"), ("engines", 1),
    ],
)  # fmt: skip
def test_impossible_setting_is_refused_by_name(field: str, value: object) -> None:
    settings = {"batch_groups": 4, "shards": 2, "engines": 2, field: value}
    with pytest.raises(ValueError, match=f"{field}: "):
        Setting(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogNormal(0.0, 1.0), "mean_s"),
        (lambda: LogNormal(1.0, 9.0), "sigma"),
        (lambda: LogNormal(2.0, 1.0, 1.0), "longest_s"),
        (lambda: Measured([]), "seconds"),
    ],
)
def test_impossible_durations_are_refused_by_name(make: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()  # type: ignore[operator]


def test_messages_to_the_clock_grow_with_shards_and_not_with_rows() -> None:
    def messages(shards: int, groups: int) -> float:
        setting = Setting(
            batch_groups=groups, max_staleness=1, engines=shards, concurrency=groups // shards, shards=shards,
            clock_s=0.0005, row_train_s=0.3 / groups, step_s=0.1, updates=12,
        )  # fmt: skip
        return simulate(setting).clock_messages

    few, many, twice = messages(4, 32), messages(4, 128), messages(8, 128)
    assert many < 2 * few, f"{few:.0f} messages an update for 32 groups, {many:.0f} for 128"
    assert max(few / 4, many / 4, twice / 8) < 20, "of a shard"
