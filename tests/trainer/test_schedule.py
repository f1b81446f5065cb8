"""The learning rate by step."""

from __future__ import annotations

from itertools import pairwise

import pytest

from flowrl.trainer.schedule import learning_rate


def rates(schedule: str, warmup_steps: int = 4) -> list[float]:
    return [
        learning_rate(step, peak=2.0, warmup_steps=warmup_steps, schedule=schedule, decay_steps=14, final_ratio=0.25)
        for step in range(20)
    ]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_rate_rises_from_above_zero_to_its_peak(schedule: str) -> None:
    found = rates(schedule)
    assert 0 < found[0] < found[1] < found[2] < found[3] < found[4] == 2.0


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_rate_falls_to_its_final_share_and_stays(schedule: str) -> None:
    found = rates(schedule)
    assert all(later < earlier for earlier, later in pairwise(found[4:15]))
    assert found[9] == pytest.approx(1.25)
    assert found[14:] == [0.5] * 6


def test_constant_rate_stays_at_its_peak() -> None:
    assert rates("constant", warmup_steps=0) == [2.0] * 20


def test_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"train.schedule: 'step'"):
        rates("step")
