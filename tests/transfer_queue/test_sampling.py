"""How much one take gets, and how batches are spread."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.sampling import Basket, balanced_partition


def test_basket_takes_whole_units_up_to_its_rows() -> None:
    basket: Basket[int] = Basket(5)
    assert [basket.accepts([0, 0]), basket.accepts([0, 0]), basket.accepts([0, 0])] == [True, True, False]


def test_unit_larger_than_the_basket_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(ValueError, match="max_rows: 2"):
        Basket(2).accepts([0, 0, 0])


def test_budget_bounds_the_cost_but_never_starves_a_long_row() -> None:
    basket: Basket[int] = Basket(10, budget=5, cost=sum)
    assert [basket.accepts([9]), basket.accepts([1])] == [True, False]
    basket = Basket(10, budget=5, cost=sum)
    assert [basket.accepts([2]), basket.accepts([3]), basket.accepts([1])] == [True, True, False]


@given(st.lists(st.integers(0, 1000), max_size=60), st.integers(1, 8))
def test_partition_loses_nothing_and_is_within_four_thirds(lengths: list[int], num_ranks: int) -> None:
    parts = balanced_partition(lengths, num_ranks)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in part) for part in parts]
    ideal = max([sum(lengths) / num_ranks, *lengths, *(sum(pair) for pair in _forced_pair(lengths, num_ranks))])
    assert max(loads) <= 4 / 3 * ideal + 1e-9


def _forced_pair(lengths: list[int], num_ranks: int) -> list[tuple[int, int]]:
    """Of the num_ranks + 1 longest, two must share a rank: at best the two shortest of them."""
    ordered = sorted(lengths, reverse=True)
    return [(ordered[num_ranks - 1], ordered[num_ranks])] if len(ordered) > num_ranks else []
