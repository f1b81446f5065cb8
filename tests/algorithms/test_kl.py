"""KL estimators, coefficients and where the KL enters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.algorithms import kl


def estimate(name: str, d: float) -> tuple[float, float]:
    logprob = torch.tensor(-1.0 + d, requires_grad=True)
    value = getattr(kl, name)(logprob, torch.tensor(-1.0))
    value.backward()
    return value.item(), logprob.grad.item()


@settings(max_examples=60, deadline=None)
@given(d=st.floats(-2.0, 4.0, width=32))
def test_estimators_agree_with_float64_in_value_and_gradient(d: float) -> None:
    d = float(torch.tensor(-1.0 + d) + 1.0)
    k3 = math.exp(-d) + d - 1
    for name, value, slope in (
        ("k1", d, 1.0),
        ("k2", d * d / 2, d),
        ("k3", k3, 1 - math.exp(-d)),
        ("k3_plus", k3, d),
    ):
        assert estimate(name, d) == pytest.approx((value, slope), rel=1e-5, abs=1e-6)


def test_k3_is_exact_near_zero() -> None:
    """A plain exp loses everything here: e^{-d} + d - 1 is d²/2, far below float32's step at 1."""
    value = kl.k3(torch.tensor(1e-4), torch.tensor(0.0)).item()
    assert value == pytest.approx(0.5e-8, rel=2e-3)


def test_k3_is_bounded_and_never_negative() -> None:
    d = torch.tensor([-1e4, -30.0, -2.5, 0.0, 3.0, 30.0, 1e4])
    values = kl.k3(d, torch.zeros(7))
    assert values.min() >= 0 and values.max() == 10 and values.isfinite().all()
    assert kl.k3_plus(d, torch.zeros(7)).isfinite().all()


def test_estimators_average_to_the_kl() -> None:
    """Over tokens that the policy samples: k1 and k3 in value, k2 and k3_plus in gradient."""
    logits = torch.tensor([0.3, -0.5, 0.9, 0.0], requires_grad=True)
    logprob, ref = logits.log_softmax(0), torch.tensor([0.1, 0.2, 0.3, -0.6]).log_softmax(0)
    exact = (logprob.exp() * (logprob - ref)).sum()
    (exact_slope,) = torch.autograd.grad(exact, logits, retain_graph=True)
    weight = logprob.exp().detach()
    for name in ("k1", "k3"):
        assert (weight * getattr(kl, name)(logprob, ref)).sum().item() == pytest.approx(exact.item(), rel=1e-4)
    for name in ("k2", "k3_plus"):
        (slope,) = torch.autograd.grad((weight * getattr(kl, name)(logprob, ref)).sum(), logits, retain_graph=True)
        torch.testing.assert_close(slope, exact_slope, rtol=1e-4, atol=1e-6)


def test_kl_enters_the_reward_on_tokens_that_count() -> None:
    reward_BT, mask_BT = torch.tensor([[0.0, 1.0, 5.0]]), torch.tensor([[1.0, 1.0, 0.0]])
    kl_BT = torch.tensor([[0.5, -1.0, torch.nan]], requires_grad=True)
    penalised_BT = kl.penalised_reward(reward_BT, kl_BT, mask_BT, coef=0.1)
    torch.testing.assert_close(penalised_BT, torch.tensor([[-0.05, 1.1, 0.0]]))
    assert not penalised_BT.requires_grad
    assert kl.mean_kl(kl_BT, mask_BT).item() == pytest.approx(-0.25)
    assert kl.mean_kl(kl_BT, torch.zeros(1, 3)).item() == 0


def test_kl_enters_the_loss_on_tokens_that_count() -> None:
    logprob_BT = torch.tensor([[-1.0, -2.0, torch.nan]], requires_grad=True)
    mask_BT = torch.tensor([[1.0, 1.0, 0.0]])
    loss_BT = kl.kl_loss(logprob_BT, torch.full((1, 3), -1.5), mask_BT, coef=0.2, estimator="k2")
    torch.testing.assert_close(loss_BT.detach(), torch.tensor([[0.025, 0.025, 0.0]]))
    loss_BT.sum().backward()
    torch.testing.assert_close(logprob_BT.grad, torch.tensor([[0.1, -0.1, 0.0]]))
    with pytest.raises(ValueError, match="k4"):
        kl.kl_loss(logprob_BT, logprob_BT, mask_BT, coef=0.2, estimator="k4")


def test_the_adaptive_coefficient_seeks_its_target() -> None:
    coefficient = kl.AdaptiveKL(0.2, target=0.1, horizon=1000)
    assert coefficient.update(0.5, 100) == pytest.approx(0.2 * 1.02)
    assert coefficient.update(0.0, 100) == pytest.approx(0.2 * 1.02 * 0.98)
    assert coefficient.update(0.11, 100) == pytest.approx(0.2 * 1.02 * 0.98 * 1.01)
    value = coefficient.value
    assert coefficient.update(0.1, 100) == pytest.approx(value)
    assert kl.FixedKL(0.3).update(9.0, 10**6) == 0.3
    assert (kl.AdaptiveKL(0.2).target, kl.AdaptiveKL(0.2).horizon) == (0.1, 10000)


def test_coefficients_that_make_no_sense_are_refused() -> None:
    for settings_, name in (
        ({"init": 0.0}, "init"),
        ({"init": 1, "target": 0}, "target"),
        ({"init": 1, "horizon": -1}, "hor"),
    ):
        with pytest.raises(ValueError, match=name):
            kl.AdaptiveKL(**settings_)
    with pytest.raises(ValueError, match="coef"):
        kl.FixedKL(-0.1)


def test_epochs_stop_past_one_and_a_half_targets() -> None:
    assert not kl.is_past_target(0.15, 0.1) and kl.is_past_target(0.151, 0.1)
