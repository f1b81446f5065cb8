"""The critic. Owns the value loss and how much of the return the critic explains; knows no policy."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.algorithms.masked import centre, check_shapes, masked_mean, only

# Far below any useful critic; keeps the logged number finite when the returns hardly vary.
LEAST_EXPLAINED = -1e6


class ValueLoss(NamedTuple):
    """loss_BT: a loss for each token, 0 where masked, for `aggregation.aggregate`. metrics: detached scalars."""

    loss_BT: Tensor
    metrics: dict[str, Tensor]


def value_loss(
    value_BT: Tensor, old_value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor, clip: float | None = 0.5
) -> ValueLoss:
    """0.5·max((v-R)², (clip(v, v_old ± clip)-R)²); `clip=None` is 0.5·(v-R)². Huang et al. 2022."""
    check_shapes(mask_BT, value_BT=value_BT, old_value_BT=old_value_BT, return_BT=return_BT)
    is_on_BT = mask_BT > 0
    value_BT = only(value_BT, is_on_BT)
    return_BT = only(return_BT.detach(), is_on_BT)
    loss_BT = (value_BT - return_BT).square()
    is_clipped_BT = torch.zeros_like(is_on_BT)
    if clip is not None:
        if clip <= 0:
            raise ValueError(f"clip: {clip}; a clip range must be positive, None turns it off")
        old_BT = only(old_value_BT.detach(), is_on_BT)
        clipped_loss_BT = (old_BT + (value_BT - old_BT).clamp(-clip, clip) - return_BT).square()
        is_clipped_BT = (clipped_loss_BT > loss_BT).detach()
        loss_BT = torch.maximum(loss_BT, clipped_loss_BT)
    metrics = {
        "critic/vf_clipfrac": masked_mean(is_clipped_BT, is_on_BT),
        "critic/vf_explained_var": explained_variance(value_BT.detach(), return_BT, mask_BT),
    }
    return ValueLoss(loss_BT / 2, metrics)


def explained_variance(value_BT: Tensor, return_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """1 - Var(R - V)/Var(R) over tokens that count: 1 is perfect, 0 no better than a constant. 0 if R is constant."""
    is_on_BT = mask_BT > 0
    _, _, return_variance = centre(return_BT, is_on_BT)
    _, _, error_variance = centre(return_BT - value_BT, is_on_BT)
    has_spread = return_variance > 0
    explained = 1 - error_variance / torch.where(has_spread, return_variance, 1.0)
    return torch.where(has_spread, explained.clamp(min=LEAST_EXPLAINED), 0.0)
