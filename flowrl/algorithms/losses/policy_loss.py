"""What every policy loss starts from and returns. Owns ratios, clipping and metrics; knows no particular loss."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.algorithms.masked import MAX_LOGRATIO, check_shapes, masked_mean, only

Metrics = dict[str, Tensor]


class PolicyLoss(NamedTuple):
    """loss_BT: a loss for each token, 0 where masked; carries the gradient. metrics: detached scalars on the device,
    means over this call's tokens (weigh by tokens to combine micro-batches), finite even when every token is masked."""

    loss_BT: Tensor
    metrics: Metrics


class Tokens(NamedTuple):
    """The inputs of a loss, float32, 0 where masked, checked. `logratio_BT` is not yet clamped; only it and
    `logprob_BT` carry a gradient."""

    logprob_BT: Tensor
    logratio_BT: Tensor
    advantage_BT: Tensor
    is_on_BT: Tensor

    @classmethod
    def of(cls, logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor) -> Tokens:
        """`advantage_BT` may be (B, 1): one for the whole row."""
        if logprob_BT.ndim != 2:
            raise ValueError(f"logprob_BT: shape {tuple(logprob_BT.shape)}; must be (samples, tokens)")
        if advantage_BT.shape == (logprob_BT.shape[0], 1):
            advantage_BT = advantage_BT.expand_as(logprob_BT)
        check_shapes(logprob_BT, old_logprob_BT=old_logprob_BT, advantage_BT=advantage_BT, mask_BT=mask_BT)
        is_on_BT = mask_BT > 0
        logprob_BT = only(logprob_BT, is_on_BT)
        logratio_BT = logprob_BT - only(old_logprob_BT.detach(), is_on_BT)
        return cls(logprob_BT, logratio_BT, only(advantage_BT.detach(), is_on_BT), is_on_BT)

    def result(self, loss_BT: Tensor, is_clipped_BT: Tensor, is_lower_BT: Tensor | None = None) -> PolicyLoss:
        """The loss with the field's metrics. `is_lower_BT`: where the dual clip (or a cap) took over."""
        bounded_BT = self.logratio_BT.detach().clamp(-MAX_LOGRATIO, MAX_LOGRATIO)
        lower_BT = torch.zeros_like(is_clipped_BT) if is_lower_BT is None else is_lower_BT
        metrics = {
            "actor/ppo_kl": masked_mean(-bounded_BT, self.is_on_BT),
            "actor/pg_clipfrac": masked_mean(is_clipped_BT, self.is_on_BT),
            "actor/pg_clipfrac_lower": masked_mean(lower_BT, self.is_on_BT),
        }
        return PolicyLoss(only(loss_BT, self.is_on_BT), metrics)


class Clipped(NamedTuple):
    loss_BT: Tensor
    is_clipped_BT: Tensor
    is_lower_BT: Tensor


def clip_ratio(ratio_BT: Tensor, lo: float | None, hi: float | None) -> Tensor:
    """clip to [1 - lo, 1 + hi]; None leaves a side open."""
    if lo is None and hi is None:
        return ratio_BT
    return ratio_BT.clamp(None if lo is None else 1 - lo, None if hi is None else 1 + hi)


def pessimistic(ratio_BT: Tensor, advantage_BT: Tensor, lo: float | None, hi: float | None, c: float | None) -> Clipped:
    """max(-Aρ, -A·clip(ρ)), and for A < 0 at most -cA (dual clip) unless c is None. Schulman et al. 2017, eq. 7; Ye et
    al. 2020."""
    check_clip(lo, hi, c)
    plain_BT = -advantage_BT * ratio_BT
    clipped_BT = -advantage_BT * clip_ratio(ratio_BT, lo, hi)
    loss_BT = torch.maximum(plain_BT, clipped_BT)
    is_clipped_BT = (clipped_BT > plain_BT).detach()
    if c is None:
        return Clipped(loss_BT, is_clipped_BT, torch.zeros_like(is_clipped_BT))
    ceiling_BT = -advantage_BT * c
    is_lower_BT = ((advantage_BT < 0) & (loss_BT > ceiling_BT)).detach()
    return Clipped(torch.where(is_lower_BT, ceiling_BT, loss_BT), is_clipped_BT, is_lower_BT)


def check_clip(lo: float | None, hi: float | None, c: float | None) -> None:
    """Raises ValueError for a bound that clips the wrong way."""
    for name, bound in (("lo", lo), ("hi", hi)):
        if bound is not None and bound < 0:
            raise ValueError(f"{name}: {bound}; a clip range must not be negative")
    if c is not None and c <= 1:
        raise ValueError(f"c: {c}; a bound on the ratio must exceed 1")
