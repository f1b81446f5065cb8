from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowrl.data.order import prompt_at


@given(size=st.integers(1, 60), epoch=st.integers(0, 4), seed=st.integers(0, 2**32))
def test_every_epoch_visits_every_prompt_once(size: int, epoch: int, seed: int) -> None:
    visited = [prompt_at(epoch * size + place, size, seed) for place in range(size)]
    assert sorted(visited) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        (epoch, seed): tuple(prompt_at(epoch * 50 + place, 50, seed) for place in range(50))
        for epoch in range(2)
        for seed in range(2)
    }
    assert len(set(orders.values())) == 4


def test_another_process_computes_the_same_prompt() -> None:
    code = "from flowrl.data.order import prompt_at; print([prompt_at(g, 1000, 7) for g in (0, 999, 1000, 123456)])"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert said.strip() == str([prompt_at(group, 1000, 7) for group in (0, 999, 1000, 123456)])


@pytest.mark.parametrize(("group", "size", "field"), [(0, 0, "size"), (-1, 5, "group")])
def test_a_prompt_that_cannot_be_is_refused_by_name(group: int, size: int, field: str) -> None:
    with pytest.raises(ValueError, match=rf"^{field}: "):
        prompt_at(group, size, 0)
