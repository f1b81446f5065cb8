"""The critic, the reward model, preferences and the terms beside the policy loss."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.algorithms import preference, reward_model, shaping, value


def test_value_loss_agrees_with_float64_in_value_and_gradient() -> None:
    rng = np.random.default_rng(0)
    v, old, target = (rng.normal(size=(3, 5)).astype(np.float32) for _ in range(3))
    mask = (rng.random((3, 5)) > 0.3).astype(np.float32)
    value_BT = torch.tensor(v, requires_grad=True)
    loss = value.value_loss(value_BT, torch.tensor(old), torch.tensor(target), torch.tensor(mask))
    loss.loss_BT.sum().backward()
    for index in np.ndindex(3, 5):
        x, o, r = float(v[index]), float(old[index]), float(target[index])
        near = min(max(x, o - 0.5), o + 0.5)
        plain, clipped = (x - r) ** 2, (near - r) ** 2
        slope = (x - r) if plain >= clipped else (near - r) * (abs(x - o) < 0.5)
        on = mask[index]
        assert loss.loss_BT[index].item() == pytest.approx(0.5 * max(plain, clipped) * on, rel=1e-5, abs=1e-6)
        assert value_BT.grad[index].item() == pytest.approx(slope * on, rel=1e-5, abs=1e-6)


def test_value_loss_by_hand() -> None:
    """v moved 2 from its old value; the clip holds it at 0.5, further from the return, so that loss counts."""
    loss = value.value_loss(torch.tensor([[2.0]]), torch.zeros(1, 1), torch.full((1, 1), 2.0), torch.ones(1, 1))
    assert loss.loss_BT.item() == pytest.approx(0.5 * 1.5**2) and loss.metrics["critic/vf_clipfrac"] == 1
    free = value.value_loss(
        torch.tensor([[2.0]]), torch.zeros(1, 1), torch.full((1, 1), 1.0), torch.ones(1, 1), clip=None
    )
    assert free.loss_BT.item() == 0.5


def test_value_loss_with_everything_masked() -> None:
    value_BT = torch.full((2, 2), torch.nan, requires_grad=True)
    loss = value.value_loss(value_BT, value_BT.detach(), value_BT.detach(), torch.zeros(2, 2))
    loss.loss_BT.sum().backward()
    assert loss.loss_BT.sum() == 0 and torch.equal(value_BT.grad, torch.zeros(2, 2))
    assert all(metric.isfinite() for metric in loss.metrics.values())


def test_explained_variance() -> None:
    return_BT, mask_BT = torch.tensor([[1.0, 2.0, 4.0, 99.0]]), torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    assert value.explained_variance(return_BT + 3, return_BT, mask_BT).item() == pytest.approx(1.0)
    assert value.explained_variance(torch.zeros(1, 4), return_BT, mask_BT).item() == pytest.approx(0.0)
    guess_BT = torch.tensor([[1.0, 1.0, 3.0, -9.0]])
    expected = 1 - np.var([0.0, 1.0, 1.0], ddof=1) / np.var([1.0, 2.0, 4.0], ddof=1)
    assert value.explained_variance(guess_BT, return_BT, mask_BT).item() == pytest.approx(expected, rel=1e-5)
    assert value.explained_variance(guess_BT, torch.full((1, 4), 0.1), mask_BT).item() == 0


def test_bradley_terry_by_hand() -> None:
    chosen_B, rejected_B = torch.tensor([2.0, 0.0], requires_grad=True), torch.tensor([1.0, 3.0])
    pairs = reward_model.bradley_terry(chosen_B, rejected_B, margin=0.5)
    expected = [math.log1p(math.exp(-0.5)), math.log1p(math.exp(3.5))]
    assert pairs.loss_B.tolist() == pytest.approx(expected, rel=1e-5)
    assert pairs.metrics["pair/accuracy"] == 0.5 and pairs.metrics["pair/margin"] == -1.0
    pairs.loss_B.sum().backward()
    assert chosen_B.grad.tolist() == pytest.approx([-1 / (1 + math.exp(0.5)), -1 / (1 + math.exp(-3.5))], rel=1e-5)


def test_pairs_far_apart_stay_finite() -> None:
    lead_B = torch.tensor([-1e6, 1e6], requires_grad=True)
    pairs = reward_model.bradley_terry(lead_B, torch.zeros(2))
    pairs.loss_B.sum().backward()
    assert pairs.loss_B.tolist() == [1e6, 0.0] and lead_B.grad.tolist() == [-1.0, 0.0]


def test_dpo_by_hand() -> None:
    pairs = preference.dpo(*(torch.tensor([number]) for number in (-10.0, -14.0, -11.0, -12.0)))
    assert pairs.loss_B.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-5)
    assert pairs.metrics["pair/accuracy"] == 1 and pairs.metrics["pair/margin"].item() == pytest.approx(0.3, rel=1e-5)
    at_start = preference.dpo(*(torch.tensor([number]) for number in (-5.0, -9.0, -5.0, -9.0)))
    assert at_start.loss_B.item() == pytest.approx(math.log(2))
    with pytest.raises(ValueError, match="beta"):
        preference.dpo(*[torch.zeros(1)] * 4, beta=0.0)


def test_an_ensemble_reports_its_spread() -> None:
    score_KB = torch.tensor([[1.0, 5.0], [3.0, 5.0]])
    for mode, expected in (("mean", [2.0, 5.0]), ("mean-std", [2 - 2 * 2**0.5, 5.0]), ("min", [1.0, 5.0])):
        reward_B, uncertainty_B = reward_model.ensemble(score_KB, mode, k=2.0)
        assert reward_B.tolist() == pytest.approx(expected)
        assert uncertainty_B.tolist() == pytest.approx([2**0.5, 0.0])
    assert reward_model.ensemble(score_KB[:1])[1].tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="median"):
        reward_model.ensemble(score_KB, "median")


def test_the_reward_is_read_at_the_last_token_on_either_side_of_the_padding() -> None:
    hidden_BTD = torch.arange(12.0).reshape(3, 4, 1)
    attention_mask_BT = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]])
    assert reward_model.last_token_state(hidden_BTD, attention_mask_BT).flatten().tolist() == [1, 7, 11]
    with pytest.raises(ValueError, match="without a token"):
        reward_model.last_token_state(hidden_BTD, torch.zeros(3, 4))


def test_rewards_are_clipped_to_ten() -> None:
    assert reward_model.clip_reward(torch.tensor([-99.0, 0.5, 12.0])).tolist() == [-10.0, 0.5, 10.0]


@settings(max_examples=40, deadline=None)
@given(
    rewards=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=20),
    cut=st.integers(0, 20),
)
def test_the_running_scale_does_not_depend_on_the_batches(rewards: list[float], cut: int) -> None:
    scale = reward_model.RewardScale()
    for part in (rewards[:cut], rewards[cut:]):
        scale = scale.seen(torch.tensor(part))
    assert scale.count == len(rewards) and scale.mean == pytest.approx(np.mean(rewards), abs=1e-9)
    assert scale.spread == pytest.approx(np.var(rewards) * len(rewards), rel=1e-6, abs=1e-6)
    normalised = scale.normalise(torch.tensor(rewards))
    assert normalised.isfinite().all()
    if np.std(rewards) > 1e-2:
        assert float(normalised.double().std()) == pytest.approx(1.0, rel=1e-3)


def test_entropy_is_that_of_the_distribution() -> None:
    logits_BTV = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [0.0, 0.0, -torch.inf, -torch.inf]]])
    assert shaping.token_entropy(logits_BTV)[0].tolist() == pytest.approx([math.log(4), 0.0, math.log(2)], abs=1e-6)


def test_the_entropy_bonus_rewards_entropy() -> None:
    entropy_BT = torch.tensor([[1.0, 2.0, torch.nan]], requires_grad=True)
    loss_BT = shaping.entropy_bonus(entropy_BT, torch.tensor([[1.0, 1.0, 0.0]]), coef=0.01)
    assert loss_BT[0].tolist() == pytest.approx([-0.01, -0.02, 0.0])
    loss_BT.sum().backward()
    assert entropy_BT.grad[0].tolist() == pytest.approx([-0.01, -0.01, 0.0])


def test_the_overlong_penalty_is_soft() -> None:
    penalty = shaping.overlong_penalty(torch.tensor([0, 80, 85, 90, 100, 130]), 100, 20)
    assert penalty.tolist() == pytest.approx([0, 0, -0.25, -0.5, -1, -1])
    assert shaping.overlong_penalty(95, 100, 20).item() == pytest.approx(-0.75)
    for buffer in (0, 101):
        with pytest.raises(ValueError, match="buffer"):
            shaping.overlong_penalty(95, 100, buffer)


def test_the_supervised_loss_is_the_negative_loglikelihood() -> None:
    logprob_BT = torch.tensor([[-1.0, -3.0, torch.nan]])
    assert shaping.sft_loss(logprob_BT, torch.tensor([[1.0, 1.0, 0.0]])).tolist() == [[1.0, 3.0, 0.0]]
