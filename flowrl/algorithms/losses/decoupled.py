"""Losses with three policies: behave (sampled the token), proximal (the anchor of the clip), current. Two ratios:

    u = exp(logprob - proximal)      clipped, carries the gradient
    w = exp(proximal - behave)       a weight, always there, then corrected

`old_logprob_BT` is the proximal policy; `proximal_logprob_BT`, where given, replaces it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.algorithms.corrections import Weights, importance_weights
from flowrl.algorithms.losses.policy_loss import PolicyLoss, Tokens, pessimistic
from flowrl.algorithms.masked import bounded_exp, check_shapes


def decoupled_ppo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    behave_logprob_BT: Tensor,
    proximal_logprob_BT: Tensor | None = None,
    lo: float = 0.2,
    hi: float = 0.2,
    c: float | None = None,
    level: str = "token",
    correction: str = "mask",
    floor: float = 0.0,
    cap: float = 5.0,
) -> PolicyLoss:
    """w·max(-Au, -A·clip(u, 1-lo, 1+hi)). Hilton et al. 2022; Fu et al. 2025 (AReaL).

    `correction` (with `level`, `floor`, `cap`) is a mode of `corrections.importance_weights`; "none" leaves w as it is,
    but never out.
    """
    proximal_BT = old_logprob_BT if proximal_logprob_BT is None else proximal_logprob_BT
    tokens = Tokens.of(logprob_BT, proximal_BT, advantage_BT, mask_BT)
    weights = importance_weights(
        proximal_BT, behave_logprob_BT, mask_BT, level=level, mode=correction, low=floor, high=cap
    )
    return _clip_and_weigh(tokens, weights, lo, hi, c)


def segment_ppo(
    logprob_BT: Tensor,
    old_logprob_BT: Tensor,
    advantage_BT: Tensor,
    mask_BT: Tensor,
    *,
    behave_logprob_BT: Tensor,
    segment_proximal_logprob_BT: Tensor | None = None,
    proximal_logprob_BT: Tensor | None = None,
    lo: float = 0.2,
    hi: float = 0.2,
    c: float | None = None,
    floor: float = 0.0,
    cap: float = 5.0,
) -> PolicyLoss:
    """`decoupled_ppo` with w = exp(segment_proximal - behave), masked to [floor, cap], token by token.

    `segment_proximal_logprob_BT`: a token sampled at version v has its log-prob under version v + 1 (its own sampling
    log-prob while v is current). NaN, or no tensor at all, means absent: the token's own sampling log-prob, w = 1. u
    still uses the trainer's recomputed proximal. With a lag over 1, u·w is not π/π_behave: the versions between v + 1
    and the proximal are left out, a deliberate bias for less variance.
    """
    segment_BT = behave_logprob_BT
    if segment_proximal_logprob_BT is not None:
        check_shapes(behave_logprob_BT, segment_proximal_logprob_BT=segment_proximal_logprob_BT)
        is_absent_BT = segment_proximal_logprob_BT.isnan()
        segment_BT = torch.where(is_absent_BT, behave_logprob_BT, segment_proximal_logprob_BT)
    proximal_BT = old_logprob_BT if proximal_logprob_BT is None else proximal_logprob_BT
    tokens = Tokens.of(logprob_BT, proximal_BT, advantage_BT, mask_BT)
    weights = importance_weights(
        segment_BT, behave_logprob_BT, mask_BT, level="token", mode="mask", low=floor, high=cap
    )
    return _clip_and_weigh(tokens, weights, lo, hi, c)


def _clip_and_weigh(tokens: Tokens, weights: Weights, lo: float, hi: float, c: float | None) -> PolicyLoss:
    clipped = pessimistic(bounded_exp(tokens.logratio_BT), tokens.advantage_BT, lo, hi, c)
    loss = tokens.result(clipped.loss_BT * weights.weight_BT, clipped.is_clipped_BT, clipped.is_lower_BT)
    return PolicyLoss(loss.loss_BT, loss.metrics | weights.metrics)
