"""Advantages: from rewards to what each sample or token was worth. Owns the estimators; knows no loss.

Estimators of a sample give `adv_B`; `spread` puts it on the tokens. `group_B` is an integer id, equal for samples of
one prompt; the rows of a group need not be adjacent. Nothing here carries a gradient.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.algorithms.masked import centre, check_shapes, only

WHITEN_EPS = 1e-8


def gae(
    reward_BT: Tensor, value_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0, lam: float = 1.0
) -> tuple[Tensor, Tensor]:
    """-> (adv_BT, return_BT), not whitened, 0 where masked. Schulman et al. 2016, eq. 16.

    The recursion steps over masked tokens (tool output, padding): V_{t+1} is the value of the next token that counts.
    """
    check_shapes(mask_BT, reward_BT=reward_BT, value_BT=value_BT)
    is_on_BT = mask_BT > 0
    reward_BT, value_BT = only(reward_BT, is_on_BT), only(value_BT, is_on_BT)
    adv_BT = torch.zeros_like(reward_BT)
    next_value_B = next_adv_B = reward_BT.new_zeros(len(reward_BT))
    for t in reversed(range(reward_BT.shape[1])):
        is_on_B = is_on_BT[:, t]
        delta_B = reward_BT[:, t] + gamma * next_value_B - value_BT[:, t]
        next_adv_B = torch.where(is_on_B, delta_B + gamma * lam * next_adv_B, next_adv_B)
        next_value_B = torch.where(is_on_B, value_BT[:, t], next_value_B)
        adv_BT[:, t] = torch.where(is_on_B, next_adv_B, 0.0)
    return adv_BT, adv_BT + value_BT


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True) -> Tensor:
    """(x - mean)/sqrt(var + 1e-8) over tokens that count, unbiased variance; 0 where masked.

    `shift_mean=False` adds the mean back. Equal values give exactly 0 (or their mean).
    """
    check_shapes(x_BT, mask_BT=mask_BT)
    is_on_BT = mask_BT > 0
    centred_BT, mean, variance = centre(x_BT, is_on_BT)
    white_BT = centred_BT * torch.rsqrt(variance + WHITEN_EPS)
    return white_BT if shift_mean else only(white_BT + mean, is_on_BT)


def grpo(score_B: Tensor, group_B: Tensor, eps: float = 1e-6, divide_by_std: bool = True) -> Tensor:
    """(R - μ_g)/(σ_g + eps), σ_g with ddof 1. DeepSeekMath, section 4.1.2; undivided: Dr.GRPO (Liu et al. 2025).

    A group of one has μ = 0, σ = 1. A tied group gives exactly 0.
    """
    groups = _Groups.of(score_B, group_B)
    is_alone_B = groups.size_B == 1
    centred_B = torch.where(is_alone_B, score_B.float(), groups.centred_B)
    if not divide_by_std:
        return centred_B
    variance_B = groups.total(groups.centred_B.square()) / (groups.size_B - 1).clamp(min=1)
    return centred_B / (torch.where(is_alone_B, 1.0, variance_B.sqrt()) + eps)


def rloo(score_B: Tensor, group_B: Tensor) -> Tensor:
    """R minus the mean of the others, n/(n-1)·(R - μ_g). Ahmadian et al. 2024. A group of one gives 0."""
    groups = _Groups.of(score_B, group_B)
    return groups.centred_B * groups.size_B / (groups.size_B - 1).clamp(min=1)


def reinforce_plus_plus(reward_BT: Tensor, mask_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """Discounted return-to-go over tokens that count, then whitened. Hu 2025 (REINFORCE++). -> adv_BT."""
    check_shapes(mask_BT, reward_BT=reward_BT)
    return_BT, _ = gae(reward_BT, torch.zeros_like(reward_BT, dtype=torch.float32), mask_BT, gamma=gamma, lam=1.0)
    return whiten(return_BT, mask_BT)


def reinforce_plus_plus_baseline(score_B: Tensor, group_B: Tensor, mask_BT: Tensor) -> Tensor:
    """whiten(R - μ_g) over tokens. Hu 2025 (REINFORCE++). A group of one has μ = 0, as in `grpo`. -> adv_BT."""
    return whiten(spread(grpo(score_B, group_B, divide_by_std=False), mask_BT), mask_BT)


def lite_ppo(score_B: Tensor, group_B: Tensor, eps: float = 1e-6) -> Tensor:
    """(R - μ_g)/(σ_batch + eps), σ_batch (ddof 1) over all raw scores. Liu et al. 2025 ("Tricks or traps?").

    Used with token-mean, plain clip (`c=None`), no critic, no KL. A group of one gives 0: with μ = 0 a tied batch would
    be divided by eps alone. To divide at the end of an update instead, use `centred` and `batch_std`.
    """
    return centred(score_B, group_B) / (batch_std(score_B) + eps)


def centred(score_B: Tensor, group_B: Tensor) -> Tensor:
    """R - μ_g; a group of one gives 0. What Lite PPO streams before the batch is complete."""
    return _Groups.of(score_B, group_B).centred_B


def batch_std(score_B: Tensor) -> Tensor:
    """Standard deviation of all scores, ddof 1; 0 for fewer than two."""
    _, _, variance = centre(score_B, torch.ones_like(score_B, dtype=torch.bool))
    return variance.sqrt()


def remax(score_B: Tensor, baseline_B: Tensor) -> Tensor:
    """R minus the reward of the greedy sample of the same prompt. Li et al. 2024 (ReMax)."""
    check_shapes(score_B, baseline_B=baseline_B)
    return score_B.float() - baseline_B.float()


def opo(score_B: Tensor, length_B: Tensor, group_B: Tensor) -> Tensor:
    """R - Σ len·R / Σ len within the group (lengths in tokens). Hao et al. 2025 (OPO). A group of one gives 0."""
    check_shapes(score_B, length_B=length_B)
    groups = _Groups.of(score_B, group_B)
    length_B = length_B.float()
    total_length_B = groups.total(length_B)
    baseline_B = groups.total(length_B * groups.offset_B) / torch.where(total_length_B > 0, total_length_B, 1.0)
    return groups.offset_B - baseline_B


def gdpo(scores_KB: Tensor, group_B: Tensor, weight_K: Tensor) -> Tensor:
    """Σ_k w_k·grpo(r_k), whitened over the samples of the batch. Liu et al. 2026 (GDPO, arXiv 2601.05242). -> adv_B."""
    summed_B = weighted_grpo(scores_KB, group_B, weight_K)
    return whiten(summed_B, torch.ones_like(summed_B))


def weighted_grpo(scores_KB: Tensor, group_B: Tensor, weight_K: Tensor) -> Tensor:
    """Σ_k w_k·grpo(r_k): GDPO before the batch is complete. `weight_K`: one weight for each kind of score."""
    weight_K = torch.as_tensor(weight_K, dtype=torch.float32, device=scores_KB.device)
    if scores_KB.ndim != 2 or weight_K.shape != scores_KB.shape[:1]:
        raise ValueError(f"weight_K: shape {tuple(weight_K.shape)}; must hold one weight for each row of scores_KB")
    each_KB = torch.stack([grpo(score_B, group_B) for score_B in scores_KB])
    return (weight_K[:, None] * each_KB).sum(dim=0)


def grpo_passk(score_B: Tensor, group_B: Tensor) -> Tensor:
    """The best sample of a group gets r_max - r_second, the others 0. arXiv 2503.19595. A shared best gives 0.

    Raises ValueError for a group of one: it has no second.
    """
    score_B = score_B.float()
    groups = _Groups.of(score_B, group_B)
    if bool((groups.size_B == 1).any()):
        raise ValueError("group_B: a group of one; grpo_passk compares the best with the second and needs at least two")
    best_P = groups.greatest(score_B)
    is_best_B = score_B == best_P[groups.slot_B]
    second_P = groups.greatest(torch.where(is_best_B, -torch.inf, score_B))
    num_best_B = groups.total(is_best_B.float())
    is_only_best_B = is_best_B & (num_best_B == 1)
    return torch.where(is_only_best_B, score_B - second_P[groups.slot_B], 0.0)


def spread(advantage_B: Tensor, mask_BT: Tensor) -> Tensor:
    """A sample's advantage on each of its tokens that count, 0 elsewhere."""
    return only(advantage_B[:, None].expand_as(mask_BT), mask_BT > 0)


class _Groups(NamedTuple):
    """A batch by prompt. `offset_B`: R minus the group's smallest, so that what a tied group sums to is exactly 0."""

    slot_B: Tensor
    size_B: Tensor
    offset_B: Tensor
    centred_B: Tensor
    num_groups: int

    @classmethod
    def of(cls, score_B: Tensor, group_B: Tensor) -> _Groups:
        if score_B.ndim != 1:
            raise ValueError(f"score_B: shape {tuple(score_B.shape)}; must be one score a sample")
        check_shapes(score_B, group_B=group_B)
        score_B = score_B.float()
        ids_P, slot_B = torch.unique(group_B, return_inverse=True)
        smallest_P = score_B.new_zeros(len(ids_P)).scatter_reduce(0, slot_B, score_B, "amin", include_self=False)
        offset_B = score_B - smallest_P[slot_B]
        bare = cls(slot_B, torch.empty(0), offset_B, torch.empty(0), len(ids_P))
        size_B = bare.total(torch.ones_like(score_B))
        return bare._replace(size_B=size_B, centred_B=offset_B - bare.total(offset_B) / size_B)

    def total(self, x_B: Tensor) -> Tensor:
        """Each sample gets the sum over its group."""
        return x_B.new_zeros(self.num_groups).index_add(0, self.slot_B, x_B)[self.slot_B]

    def greatest(self, x_B: Tensor) -> Tensor:
        """The greatest of each group, (P,)."""
        return x_B.new_zeros(self.num_groups).scatter_reduce(0, self.slot_B, x_B, "amax", include_self=False)
