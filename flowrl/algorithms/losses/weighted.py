"""Losses whose ratio is only a weight, -sg(weight)·A·logprob: cispo, topr, dppo_tv.

ρ = exp(logprob - old_logprob), sg = stop gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.algorithms.losses.policy_loss import PolicyLoss, Tokens, check_clip, clip_ratio
from flowrl.algorithms.masked import bounded_exp, sequence_sum


def cispo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    lo: float | None = 0.2,
    hi: float | None = 0.28,
) -> PolicyLoss:
    """-sg(clip(ρ, 1-lo, 1+hi))·A·logprob. MiniMax-M1, 2025, which has no lower clip: that is `lo=None`."""
    check_clip(lo, hi, None)
    tokens = Tokens.of(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
    ratio_BT = bounded_exp(tokens.logratio_BT.detach())
    weight_BT = clip_ratio(ratio_BT, lo, hi)
    return tokens.result(-weight_BT * tokens.advantage_BT * tokens.logprob_BT, weight_BT != ratio_BT)


def topr(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    level: str = "trajectory",
) -> PolicyLoss:
    """A > 0: -A·logprob. Otherwise -sg(clip(ρ, 0, 1))·A·logprob. Le Roux et al. 2025 (TOPR).

    level "trajectory": ρ of the whole response (exp of the masked sum), the paper's; "token": each token's own.
    """
    if level not in ("trajectory", "token"):
        raise ValueError(f"level: {level!r}; must be 'trajectory' or 'token'")
    tokens = Tokens.of(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
    logratio_BT = tokens.logratio_BT.detach()
    if level == "trajectory":
        logratio_BT = sequence_sum(logratio_BT, tokens.is_on_BT).expand_as(logratio_BT)
    ratio_BT = bounded_exp(logratio_BT)
    is_positive_BT = tokens.advantage_BT > 0
    weight_BT = torch.where(is_positive_BT, 1.0, ratio_BT.clamp(0, 1))
    is_clipped_BT = ~is_positive_BT & (ratio_BT > 1)
    return tokens.result(-weight_BT * tokens.advantage_BT * tokens.logprob_BT, is_clipped_BT)


def dppo_tv(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    lo: float = 0.2,
    hi: float = 0.2,
    c: float = 20.0,
) -> PolicyLoss:
    """-A·sg(min(ρ, c))·logprob on tokens inside a trust region of probabilities, 0 outside.

    A token is dropped where p - p_old > hi and A > 0, or p - p_old < -lo and A < 0. `old_logprob_BT` is the rollout's.
    DPPO (arXiv 2602.04879), binary total variation.
    """
    check_clip(lo, hi, c)
    tokens = Tokens.of(logprob_BT, old_logprob_BT, advantage_BT, mask_BT)
    logprob_BT = tokens.logprob_BT.detach()
    step_BT = logprob_BT.exp() - (logprob_BT - tokens.logratio_BT.detach()).exp()
    is_dropped_BT = ((tokens.advantage_BT > 0) & (step_BT > hi)) | ((tokens.advantage_BT < 0) & (step_BT < -lo))
    ratio_BT = bounded_exp(tokens.logratio_BT.detach())
    loss_BT = -tokens.advantage_BT * ratio_BT.clamp(max=c) * tokens.logprob_BT
    return tokens.result(loss_BT.masked_fill(is_dropped_BT, 0.0), is_dropped_BT, ~is_dropped_BT & (ratio_BT > c))
