"""One number from many tokens, whatever the split."""

from __future__ import annotations

import numpy as np
import pytest
import slow_float64 as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.algorithms.declarations import AGGREGATIONS
from flowrl.algorithms.losses import aggregate, denominator_share, ppo

EXAMPLE_BT = torch.tensor([[1.0, 2, 3, 4], [10, 20, 99, 99]])
MASK_BT = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 6.666667),
        ("token-sum", 40),
        ("seq-mean-token-sum", 20),
        ("seq-mean-token-mean", 8.75),
        ("seq-mean-token-sum-norm", 5),
    ],
)
def test_the_worked_example(mode: str, expected: float) -> None:
    assert aggregate(EXAMPLE_BT, MASK_BT, mode, horizon=4).item() == pytest.approx(expected, rel=1e-6)


@st.composite
def splits(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, list[int]]:
    rows, width = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    mask = (rng.random((rows, width)) < draw(st.sampled_from([0.0, 0.3, 0.8, 1.0]))).astype(np.float32)
    cuts = sorted(draw(st.sets(st.integers(1, max(rows - 1, 1)), max_size=3)))
    return rng.normal(size=(rows, width)).astype(np.float32), mask, [cut for cut in cuts if cut < rows]


@settings(max_examples=80, deadline=None)
@given(case=splits(), mode=st.sampled_from(AGGREGATIONS))
def test_a_split_changes_neither_loss_nor_gradient(case: tuple, mode: str) -> None:
    values, mask, cuts = case
    mask_BT = torch.tensor(mask)
    whole_BT = torch.tensor(values, requires_grad=True)
    whole = aggregate(whole_BT, mask_BT, mode, horizon=7)
    whole.backward()
    assert whole.item() == pytest.approx(slow.aggregate(values.astype(float), mask, mode, 7), rel=1e-5, abs=1e-6)

    split_BT = torch.tensor(values, requires_grad=True)
    parts = list(zip(split_BT.tensor_split(cuts), mask_BT.tensor_split(cuts), strict=True))
    denominator = sum(denominator_share(part_mask, mode) for _, part_mask in parts)
    total = sum(aggregate(part, part_mask, mode, denominator, horizon=7) for part, part_mask in parts)
    total.backward()
    torch.testing.assert_close(total, whole)
    torch.testing.assert_close(split_BT.grad, whole_BT.grad)


@settings(max_examples=30, deadline=None)
@given(case=splits(), mode=st.sampled_from(AGGREGATIONS), extra=st.integers(1, 4))
def test_padding_changes_nothing(case: tuple, mode: str, extra: int) -> None:
    values, mask, _ = case
    wide = np.pad(values, ((0, extra), (0, extra)), constant_values=np.nan)
    wide_mask = np.pad(mask, ((0, extra), (0, extra)))
    padded = aggregate(torch.tensor(wide), torch.tensor(wide_mask), mode, horizon=7)
    torch.testing.assert_close(padded, aggregate(torch.tensor(values), torch.tensor(mask), mode, horizon=7))


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_nothing_to_count_is_legal(mode: str) -> None:
    loss_BT = torch.ones(2, 3, requires_grad=True)
    loss = aggregate(loss_BT, torch.zeros(2, 3), mode, denominator=0, horizon=4)
    loss.backward()
    assert loss == 0 and torch.equal(loss_BT.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("mode", AGGREGATIONS)
def test_streamed_gradients_divided_at_the_end_are_those_of_the_batch(mode: str) -> None:
    """Micro-batches arrive one by one; nobody knows the denominator until the last."""
    generator = torch.Generator().manual_seed(0)
    old_BT = -torch.rand(6, 5, generator=generator)
    x_BT = old_BT + 0.3 * torch.randn(6, 5, generator=generator)
    adv_BT = torch.randn(6, 1, generator=generator)
    mask_BT = (torch.rand(6, 5, generator=generator) > 0.3).float()

    batch_BT = x_BT.clone().requires_grad_()
    aggregate(ppo(batch_BT, old_BT, adv_BT, mask_BT).loss_BT, mask_BT, mode, horizon=5).backward()

    streamed_BT, denominator = x_BT.clone().requires_grad_(), torch.zeros(())
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        loss = ppo(streamed_BT[rows], old_BT[rows], adv_BT[rows], mask_BT[rows])
        aggregate(loss.loss_BT, mask_BT[rows], mode, denominator=1, horizon=5).backward()
        denominator += denominator_share(mask_BT[rows], mode)
    torch.testing.assert_close(streamed_BT.grad / denominator.clamp(min=1), batch_BT.grad)


def test_a_correction_does_not_change_the_denominator() -> None:
    dropped_BT = EXAMPLE_BT.masked_fill(torch.tensor([[True, False, False, False], [False] * 4]), 0.0)
    assert aggregate(dropped_BT, MASK_BT, "token-mean").item() == pytest.approx(39 / 6)


def test_unknown_modes_and_missing_horizons_are_refused() -> None:
    with pytest.raises(ValueError, match="token-average"):
        aggregate(EXAMPLE_BT, MASK_BT, "token-average")
    with pytest.raises(ValueError, match="horizon"):
        aggregate(EXAMPLE_BT, MASK_BT, "seq-mean-token-sum-norm")
    with pytest.raises(ValueError, match="mask_BT"):
        aggregate(EXAMPLE_BT, MASK_BT[:1])
