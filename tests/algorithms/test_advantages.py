"""Each estimator against its slow float64 twin, and the cases that go wrong in practice."""

from __future__ import annotations

import numpy as np
import pytest
import slow_float64 as slow
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.algorithms import advantages

SCORE_B = torch.tensor([1.0, 0.0, 0.3, 0.0, 2.5, 0.7, -1.0, 0.7])
GROUP_B = torch.tensor([7, -3, 7, -3, 7, 2, -3, 7])
LENGTH_B = torch.tensor([3, 1, 9, 4, 2, 6, 5, 8])


def close(actual: torch.Tensor, expected: np.ndarray, tolerance: float = 2e-5) -> None:
    assert actual.dtype == torch.float32
    np.testing.assert_allclose(actual.numpy(), expected, rtol=tolerance, atol=tolerance)


@st.composite
def batches(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    size = draw(st.integers(2, 12))
    scores = draw(st.lists(st.integers(-20, 20).map(lambda tenths: tenths / 10), min_size=size, max_size=size))
    groups = draw(st.lists(st.integers(0, 3), min_size=size, max_size=size))
    return torch.tensor(scores), torch.tensor(groups)


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_group_estimators_agree_with_the_slow_version(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    score_B, group_B = batch
    group = group_B.tolist()
    close(advantages.grpo(score_B, group_B), slow.grpo(score_B, group), 1e-4)
    close(advantages.grpo(score_B, group_B, divide_by_std=False), slow.grpo(score_B, group, divide_by_std=False))
    close(advantages.rloo(score_B, group_B), slow.rloo(score_B, group))
    if len(score_B.unique()) > 1:
        close(advantages.lite_ppo(score_B, group_B), slow.lite_ppo(score_B, group), 1e-4)


@settings(max_examples=40, deadline=None)
@given(batch=batches(), seed=st.integers(0, 999))
def test_row_order_does_not_matter(batch: tuple[torch.Tensor, torch.Tensor], seed: int) -> None:
    score_B, group_B = batch
    order = torch.randperm(len(score_B), generator=torch.Generator().manual_seed(seed))
    for estimator in (advantages.grpo, advantages.rloo, advantages.lite_ppo):
        straight = estimator(score_B, group_B)[order]
        torch.testing.assert_close(estimator(score_B[order], group_B[order]), straight, rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(score=st.floats(-1e4, 1e4, width=32), size=st.integers(2, 33))
def test_a_tied_group_gives_exactly_zero(score: float, size: int) -> None:
    score_B = torch.full((size,), score)
    group_B = torch.zeros(size, dtype=torch.long)
    for estimator in (advantages.grpo, advantages.rloo, advantages.lite_ppo):
        assert torch.equal(estimator(score_B, group_B), torch.zeros(size))
    assert torch.equal(advantages.opo(score_B, torch.arange(1, size + 1), group_B), torch.zeros(size))
    assert torch.equal(advantages.gdpo(score_B[None], group_B, torch.ones(1)), torch.zeros(size))


def test_plain_float32_would_not_give_zero_on_a_tie() -> None:
    """Why ties need care: the float32 mean of equal numbers need not be that number."""
    score_B = torch.full((7,), 0.1)
    assert ((score_B - score_B.sum() / 7) / (score_B.std() + 1e-6)).abs().max() > 0


def test_a_group_of_one() -> None:
    score_B, group_B = torch.tensor([3.0, 1.0, 0.0]), torch.tensor([5, 1, 1])
    assert advantages.grpo(score_B, group_B)[0].item() == pytest.approx(3.0, rel=2e-6)
    assert advantages.rloo(score_B, group_B)[0] == 0
    assert advantages.opo(score_B, torch.tensor([2, 2, 2]), group_B)[0] == 0
    assert advantages.lite_ppo(score_B, group_B)[0] == 0
    with pytest.raises(ValueError, match="group of one"):
        advantages.grpo_passk(score_B, group_B)


def test_groups_need_not_be_adjacent() -> None:
    close(advantages.grpo(SCORE_B, GROUP_B), slow.grpo(SCORE_B, GROUP_B.tolist()))
    close(advantages.opo(SCORE_B, LENGTH_B, GROUP_B), slow.opo(SCORE_B, LENGTH_B, GROUP_B.tolist()))
    assert advantages.grpo(torch.tensor([1.0, 5.0, 0.0, 5.0]), torch.tensor([1, 2, 1, 2])).tolist() == pytest.approx(
        [2**-0.5, 0, -(2**-0.5), 0], abs=1e-5
    )


def test_grpo_by_hand() -> None:
    adv_B = advantages.grpo(torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.tensor([0, 0, 0, 0]))
    close(adv_B, np.array([0.866025, -0.866025, -0.866025, 0.866025]))


def test_passk_rewards_the_only_best() -> None:
    score_B, group_B = torch.tensor([1.0, 4.0, 2.5, 3.0, 3.0]), torch.tensor([0, 0, 0, 1, 1])
    assert advantages.grpo_passk(score_B, group_B).tolist() == [0, 1.5, 0, 0, 0]
    close(advantages.grpo_passk(score_B, group_B), slow.passk(score_B, group_B.tolist()))


def test_remax_subtracts_the_greedy_reward() -> None:
    assert advantages.remax(torch.tensor([1.0, 0.5]), torch.tensor([0.25, 0.5])).tolist() == [0.75, 0.0]


def test_gdpo_whitens_the_weighted_sum_over_samples() -> None:
    scores_KB, weight_K = torch.stack([SCORE_B, SCORE_B.flip(0).square()]), torch.tensor([0.7, 2.0])
    summed = sum(w * slow.grpo(r, GROUP_B.tolist()) for w, r in zip(weight_K.tolist(), scores_KB, strict=True))
    expected = slow.whiten(summed[None], np.ones((1, 8)))[0]
    close(advantages.gdpo(scores_KB, GROUP_B, weight_K), expected)


def test_lite_ppo_can_be_divided_at_the_end() -> None:
    streamed = advantages.centred(SCORE_B, GROUP_B) / (advantages.batch_std(SCORE_B) + 1e-6)
    assert torch.equal(streamed, advantages.lite_ppo(SCORE_B, GROUP_B))
    close(streamed, slow.lite_ppo(SCORE_B, GROUP_B.tolist()))


def random_tokens(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reward_BT, value_BT = torch.randn(2, 4, 9, generator=generator)
    return reward_BT, value_BT, (torch.rand(4, 9, generator=generator) > 0.35).float()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.97, 0.9), (1.0, 0.0)])
def test_gae_agrees_with_the_sum_over_tokens_that_count(gamma: float, lam: float) -> None:
    for seed in range(5):
        reward_BT, value_BT, mask_BT = random_tokens(seed)
        adv_BT, return_BT = advantages.gae(reward_BT, value_BT, mask_BT, gamma, lam)
        expected_adv, expected_return = slow.gae(reward_BT, value_BT, mask_BT.numpy(), gamma, lam)
        close(adv_BT, expected_adv)
        close(return_BT, expected_return)


def test_gae_by_hand() -> None:
    reward_BT, value_BT = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.9]])
    adv_BT, return_BT = advantages.gae(reward_BT, value_BT, torch.ones(1, 3), gamma=1.0, lam=0.5)
    close(adv_BT, np.array([[0.1 + 0.5 * (0.3 + 0.5 * 0.1), 0.3 + 0.5 * 0.1, 0.1]]))
    close(return_BT, adv_BT.numpy() + value_BT.numpy())


def test_masked_tokens_have_no_effect_on_gae() -> None:
    reward_BT, value_BT, mask_BT = random_tokens(1)
    expected = advantages.gae(reward_BT, value_BT, mask_BT, 0.99, 0.95)
    is_off = mask_BT == 0
    dirty = advantages.gae(
        reward_BT.masked_fill(is_off, torch.nan), value_BT.masked_fill(is_off, torch.inf), mask_BT, 0.99, 0.95
    )
    assert torch.equal(dirty[0], expected[0]) and torch.equal(dirty[1], expected[1])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_agrees_with_the_slow_version(shift_mean: bool) -> None:
    x_BT, _, mask_BT = random_tokens(3)
    x_BT = 50 + 3 * x_BT
    expected = slow.whiten(x_BT, mask_BT.numpy(), shift_mean)
    close(advantages.whiten(x_BT, mask_BT, shift_mean), expected, 1e-5)


def test_whitening_is_finite_without_spread_or_tokens() -> None:
    for mask_BT in (torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 0, 0]]), torch.ones(2, 3)):
        assert torch.equal(advantages.whiten(torch.full((2, 3), 1234.567), mask_BT), torch.zeros(2, 3))


def test_reinforce_plus_plus_whitens_the_return_to_go() -> None:
    reward_BT, _, mask_BT = random_tokens(4)
    togo, _ = slow.gae(reward_BT, np.zeros(mask_BT.shape), mask_BT.numpy(), 0.9, 1.0)
    expected = slow.whiten(togo, mask_BT.numpy())
    close(advantages.reinforce_plus_plus(reward_BT, mask_BT, 0.9), expected)


def test_reinforce_plus_plus_baseline_whitens_over_tokens() -> None:
    mask_BT = (torch.arange(10) < LENGTH_B[:, None]).float()
    lone = slow.grpo(SCORE_B, GROUP_B.tolist(), divide_by_std=False)
    expected = slow.whiten(lone[:, None] * mask_BT.numpy(), mask_BT.numpy())
    close(advantages.reinforce_plus_plus_baseline(SCORE_B, GROUP_B, mask_BT), expected)


def test_wrong_shapes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="group_B"):
        advantages.grpo(SCORE_B, GROUP_B[:3])
    with pytest.raises(ValueError, match="weight_K"):
        advantages.gdpo(SCORE_B[None], GROUP_B, torch.ones(2))
