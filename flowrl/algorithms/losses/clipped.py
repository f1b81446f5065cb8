"""Losses that clip a ratio and keep its gradient inside the clip: ppo, dapo, gspo, geo_mean, and the smooth sapo.

ρ = exp(logprob - old_logprob). Each returns a loss for each token; `aggregation.aggregate` makes one number of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.algorithms.losses.policy_loss import PolicyLoss, Tokens, check_clip, pessimistic
from flowrl.algorithms.masked import bounded_exp, sequence_mean


def ppo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    lo: float = 0.2,
    hi: float = 0.2,
    c: float | None = 3.0,
) -> PolicyLoss:
    """max(-Aρ, -A·clip(ρ, 1-lo, 1+hi)); for A < 0 at most -cA. `c=None` turns the dual clip off.

    Schulman et al. 2017, eq. 7; dual clip: Ye et al. 2020.
    """
    tokens = Tokens.of(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
    return tokens.result(*pessimistic(bounded_exp(tokens.logratio_BT), tokens.advantage_BT, lo, hi, c))


def dapo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    lo: float = 0.2,
    hi: float = 0.28,
    c: float | None = 3.0,
) -> PolicyLoss:
    """`ppo` with a higher upper clip, to be aggregated by token-mean. Yu et al. 2025 (DAPO), sections 3.1 and 3.3."""
    return ppo(logprob_BT, old_logprob_BT, advantage_BT, mask_BT, lo=lo, hi=hi, c=c)


def gspo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    lo: float = 3e-4,
    hi: float = 4e-4,
) -> PolicyLoss:
    """PPO's clip on the length-normalised ratio of the sequence, s = exp(masked mean log-ratio).

    Straight-through: a token's ratio has the value s and the gradient s·∇logprob. No dual clip. Aggregate by
    seq-mean-token-mean. Zheng et al. 2025 (GSPO), section 4.3, the token variant.
    """
    tokens = Tokens.of(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
    mean_B1 = sequence_mean(tokens.logratio_BT.detach(), tokens.is_on_BT)
    ratio_BT = bounded_exp(tokens.logprob_BT - tokens.logprob_BT.detach() + mean_B1)
    return tokens.result(*pessimistic(ratio_BT, tokens.advantage_BT, lo, hi, None))


def geo_mean(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    lo: float = 0.4,
    hi: float = 0.4,
) -> PolicyLoss:
    """-A·s for the sequence, repeated on every token; s = exp(masked mean of clipped log-ratios).

    Each token's log-ratio is clipped to [-lo, hi] (log space), pessimistically: for A > 0 the smaller of plain and
    clipped, for A < 0 the greater. A is the row's masked mean. Aggregate by seq-mean-token-mean. Zhao et al. 2025
    (GMPO).
    """
    check_clip(lo, hi, None)
    tokens = Tokens.of(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
    plain_BT, clipped_BT = tokens.logratio_BT, tokens.logratio_BT.clamp(-lo, hi)
    is_negative_BT = tokens.advantage_BT < 0
    chosen_BT = torch.where(is_negative_BT, torch.maximum(plain_BT, clipped_BT), torch.minimum(plain_BT, clipped_BT))
    ratio_B1 = bounded_exp(sequence_mean(chosen_BT, tokens.is_on_BT))
    loss_B1 = -sequence_mean(tokens.advantage_BT, tokens.is_on_BT) * ratio_B1
    return tokens.result(loss_B1.expand_as(plain_BT), (chosen_BT != plain_BT).detach())


def sapo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    tau_pos: float = 1.0,
    tau_neg: float = 1.05,
) -> PolicyLoss:
    """-A·σ(τ(ρ-1))·4/τ: a soft gate in place of the clip, narrower for A ≤ 0. Aggregate by seq-mean-token-mean.

    Gao et al. 2025 (SAPO).
    """
    for name, tau in (("tau_pos", tau_pos), ("tau_neg", tau_neg)):
        if tau <= 0:
            raise ValueError(f"{name}: {tau}; a temperature must be positive")
    tokens = Tokens.of(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
    advantage_BT = tokens.advantage_BT
    tau_BT = torch.where(advantage_BT > 0, tau_pos, tau_neg)
    gate_BT = torch.sigmoid(tau_BT * (bounded_exp(tokens.logratio_BT) - 1)) * 4 / tau_BT
    return tokens.result(-advantage_BT * gate_BT, torch.zeros_like(tokens.is_on_BT))
