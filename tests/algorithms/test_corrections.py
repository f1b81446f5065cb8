"""Weights and masks for tokens that another policy sampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import slow_float64 as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.algorithms import corrections
from flowrl.algorithms.losses import aggregate, ppo


def pair(seed: int, spread: float = 0.8) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rollout_BT = -3 * torch.rand(5, 7, generator=generator)
    train_BT = rollout_BT + spread * torch.randn(5, 7, generator=generator)
    return train_BT, rollout_BT, (torch.rand(5, 7, generator=generator) > 0.3).float()


@pytest.mark.parametrize("level", corrections.LEVELS)
@pytest.mark.parametrize("mode", list(corrections.BOUNDS))
def test_weights_agree_with_the_slow_version(level: str, mode: str) -> None:
    for seed in range(4):
        train_BT, rollout_BT, mask_BT = pair(seed)
        weight_BT, _ = corrections.importance_weights(train_BT, rollout_BT, mask_BT, level, mode, 0.6, 1.8)
        expected = slow.weights(train_BT.numpy(), rollout_BT.numpy(), mask_BT.numpy(), level, mode, 0.6, 1.8)
        np.testing.assert_allclose(weight_BT.numpy(), expected, rtol=2e-5, atol=1e-6)


def weigh(ratio: float, *arguments: object) -> float:
    one = torch.ones(1, 1)
    return corrections.importance_weights(one * math.log(ratio), one * 0, one, *arguments).weight_BT.item()


def test_bounds_left_out_are_those_of_the_mode() -> None:
    assert weigh(3.0) == 2.0 and weigh(0.01) == pytest.approx(0.01)
    assert weigh(6.0, "token", "mask") == 0.0 and weigh(0.4, "token", "mask") == 0.0
    assert weigh(4.0, "token", "mask") == pytest.approx(4.0)
    assert weigh(9.0, "token", "clip") == 5.0 and weigh(0.1, "token", "clip") == 0.5
    assert weigh(9.0, "token", "none") == pytest.approx(9.0)


def test_no_gradient_flows_through_a_weight() -> None:
    train_BT, rollout_BT, mask_BT = pair(0)
    assert not corrections.importance_weights(train_BT.requires_grad_(), rollout_BT, mask_BT).weight_BT.requires_grad


def test_metrics_by_hand() -> None:
    ratio_BT = torch.tensor([[2.0, 0.5, 8.0, 77.0]])
    mask_BT = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    _, metrics = corrections.importance_weights(ratio_BT.log(), torch.zeros(1, 4), mask_BT, mode="mask")
    assert metrics["rollout_corr/kl"].item() == pytest.approx(-math.log(8) / 3, rel=1e-5)
    assert metrics["rollout_corr/k3_kl"].item() == pytest.approx((10.5 - math.log(8)) / 3 - 1, rel=1e-5)
    assert metrics["rollout_corr/chi2_token"].item() == pytest.approx((4 + 0.25 + 64) / 3 - 1, rel=1e-5)
    assert metrics["rollout_corr/ess"].item() == pytest.approx(2.5**2 / (4.25 * 3), rel=1e-5)
    assert metrics["rollout_corr/masked_fraction"].item() == pytest.approx(1 / 3)


def test_equal_policies_weigh_one_and_measure_nothing() -> None:
    _, rollout_BT, mask_BT = pair(1)
    weight_BT, metrics = corrections.importance_weights(rollout_BT, rollout_BT, mask_BT)
    assert torch.equal(weight_BT, mask_BT)
    assert metrics["rollout_corr/ess"].item() == pytest.approx(1.0)
    assert all(metrics[f"rollout_corr/{name}"] == 0 for name in ("kl", "k3_kl", "chi2_token", "masked_fraction"))


@pytest.mark.parametrize("mask_value", [0.0, 1.0])
@pytest.mark.parametrize("mode", list(corrections.BOUNDS))
def test_a_correction_that_leaves_nothing_is_legal(mode: str, mask_value: float) -> None:
    logprob_BT = torch.zeros(2, 3, requires_grad=True)
    mask_BT = torch.full((2, 3), mask_value)
    far_BT = torch.full((2, 3), -900.0)
    weight_BT, metrics = corrections.importance_weights(logprob_BT, far_BT, mask_BT, "sequence", mode)
    loss_BT = ppo(logprob_BT, torch.zeros(2, 3), torch.ones(2, 3), mask_BT).loss_BT
    loss = aggregate(loss_BT * weight_BT, mask_BT, "token-mean", denominator=mask_BT.sum())
    loss.backward()
    assert loss.isfinite() and logprob_BT.grad.isfinite().all()
    assert all(value.isfinite() for value in metrics.values())
    if mode == "mask":
        assert loss == 0 and metrics["rollout_corr/masked_fraction"] == mask_value


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), tau=st.floats(1e-4, 3.0), on=st.floats(0, 1))
def test_m2po_drops_the_largest_until_the_rest_is_below_tau(seed: int, tau: float, on: float) -> None:
    rng = np.random.default_rng(seed)
    behave, proximal = rng.normal(size=(2, 4, 5)).astype(np.float32)
    mask = (rng.random((4, 5)) < on).astype(np.float32)
    keep_BT = corrections.m2po(torch.tensor(behave), torch.tensor(proximal), torch.tensor(mask), tau)
    np.testing.assert_array_equal(keep_BT.numpy(), slow.m2po(behave, proximal, mask, tau))


def test_m2po_may_drop_everything() -> None:
    assert corrections.m2po(torch.ones(2, 2), torch.zeros(2, 2), torch.ones(2, 2)).sum() == 0


def test_m2po_must_see_the_whole_batch() -> None:
    """Two micro-batches on their own keep other tokens than the batch does."""
    behave_BT, proximal_BT = torch.tensor([[0.05], [0.25]]), torch.zeros(2, 1)
    whole_BT = corrections.m2po(behave_BT, proximal_BT, torch.ones(2, 1))
    assert whole_BT.flatten().tolist() == [1, 1]
    assert corrections.m2po(behave_BT[1:], proximal_BT[1:], torch.ones(1, 1)).tolist() == [[0]]


def test_opsm_drops_bad_sequences_that_drifted() -> None:
    old_BT, mask_BT = torch.zeros(4, 3), torch.tensor([[1.0, 1, 0]] * 4)
    logprob_BT = torch.tensor([[-0.1, 0.0, 9.0], [-0.1, 0.0, 9.0], [0.1, 0.0, -9.0], [-1e-4, 0.0, 9.0]])
    adv_BT = torch.tensor([[-1.0] * 3, [1.0] * 3, [-1.0] * 3, [-1.0] * 3])
    keep_BT = corrections.opsm(logprob_BT, old_BT, adv_BT, mask_BT)
    assert keep_BT.tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 0], [1, 1, 0]]


@pytest.mark.parametrize(
    ("version", "current_version", "alpha"),
    [(4, 5, 0.0), (3, 5, 0.5), (1, 5, 0.75), (0, 2, 0.5), (5, 5, 0.0), (7, 5, 0.0), (-1, 5, 0.0), (0, 0, 0.0)],
)
def test_loglinear_proximal_lies_between_behave_and_current(version: int, current_version: int, alpha: float) -> None:
    proximal = corrections.loglinear_proximal(
        torch.tensor([[-2.0]]), torch.tensor([[-1.0]]), torch.tensor([[version]]), current_version
    )
    assert proximal.item() == pytest.approx(-2.0 + alpha)


def test_unknown_words_and_crossed_bounds_are_refused() -> None:
    train_BT, rollout_BT, mask_BT = pair(0)
    for arguments, word in ((("row", "mask"), "level"), (("token", "drop"), "mode"), (("token", "clip", 3, 2), "low")):
        with pytest.raises(ValueError, match=word):
            corrections.importance_weights(train_BT, rollout_BT, mask_BT, *arguments)
