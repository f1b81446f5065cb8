"""How much one take gets, and how batches are spread."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer_queue.sampling import Basket, balanced_partition


def test_basket_takes_whole_groups_up_to_its_rows() -> None:
    basket: Basket[None] = Basket(5)
    assert [basket.fill(None, 0b11, True), basket.fill(None, 0b1100, True), basket.fill(None, 0b11, True)] == [3, 12, 0]


def test_basket_of_rows_takes_the_first_that_fit() -> None:
    basket: Basket[None] = Basket(5)
    assert [basket.fill(None, 0b1011, False), basket.fill(None, 0b111010, False)] == [0b1011, 0b001010]


def test_group_larger_than_the_basket_is_an_error_and_not_a_hang() -> None:
    with pytest.raises(ValueError, match="max_rows: 2"):
        Basket(2).fill(None, 0b111, True)


def test_budget_bounds_the_cost_but_never_starves_a_long_row() -> None:
    def cost(lengths: list[int], bits: int) -> int:
        return sum(length for index, length in enumerate(lengths) if bits >> index & 1)

    basket = Basket(10, budget=5, cost=cost)
    assert basket.fill([9, 1], 0b11, False) == 0b01
    basket = Basket(10, budget=5, cost=cost)
    assert basket.fill([2, 3, 1], 0b111, False) == 0b011
    basket = Basket(10, budget=5, cost=cost)
    assert [basket.fill([2, 3], 0b11, True), basket.fill([1], 0b1, True)] == [0b11, 0]


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
