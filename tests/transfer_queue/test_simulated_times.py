"""How long responses take, where some were never seen to end."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowrl.simulate.of_run import shared_out

DURATIONS = st.lists(st.integers(1, 30).map(float), min_size=1, max_size=40)


def survival(ended: list[float], cut_off: list[float], at: float) -> float:
    """Kaplan and Meier's product over the moments at which something ended."""
    product = 1.0
    for moment in sorted(set(ended)):
        if moment <= at:
            at_risk = sum(seconds >= moment for seconds in [*ended, *cut_off])
            product *= 1 - ended.count(moment) / at_risk
    return product


@given(ended=DURATIONS, cut_off=st.lists(st.integers(1, 30).map(float), max_size=40))
def test_shares_are_those_of_the_product_limit(ended: list[float], cut_off: list[float]) -> None:
    found = shared_out(ended, cut_off)
    assert len(found) == len(ended) + len(cut_off) and set(found) <= set(ended)
    for moment in sorted(set(ended))[:-1]:
        share = sum(seconds > moment for seconds in found) / len(found)
        assert share == pytest.approx(survival(ended, cut_off, moment), abs=0.51 / len(found) + 1e-9)


def test_a_long_tail_is_seen_though_long_ones_are_dropped() -> None:
    dice = random.Random(0)
    true = [dice.lognormvariate(0, 1) for _ in range(4000)]
    limits = [dice.uniform(0.5, 8) for _ in true]
    pairs = list(zip(true, limits, strict=True))
    ended = [seconds for seconds, limit in pairs if seconds <= limit]
    cut_off = [limit for seconds, limit in pairs if seconds > limit]
    found = shared_out(ended, cut_off)
    for quantile in (0.25, 0.5, 0.75, 0.9):
        assert np.quantile(found, quantile) == pytest.approx(np.quantile(true, quantile), rel=0.1)
    assert np.quantile(ended, 0.75) < 0.85 * np.quantile(true, 0.75), "or else this shows nothing"
