"""From a loss for each token to one number. Owns what a batch is divided by; knows no policy.

A denominator counts the whole global batch (all micro-batches, all data-parallel ranks) and is fixed before any
correction masks tokens: a correction zeroes `loss_BT`, never `mask_BT`. Then the sum of the aggregates of any split by
rows is the aggregate of the whole, in value and in gradient:

    denominator = sum(denominator_share(mask_BT, mode) for every micro-batch of every rank)
    loss = aggregate(loss_BT, mask_BT, mode, denominator)        # for each micro-batch; the gradients add up

While a batch still streams in, its denominator is unknown: accumulate with `denominator=1` and divide the gradient at
the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.algorithms.declarations import AGGREGATIONS
from flowrl.algorithms.masked import check_shapes, only, sequence_mean, sequence_sum


def aggregate(
    loss_BT: Tensor,
    mask_BT: Tensor,
    mode: str = "token-mean",
    denominator: Tensor | float | None = None,
    horizon: float | None = None,
) -> Tensor:
    """One number, float32. A batch without a token that counts gives 0, with a gradient of 0.

    token-mean              Σ over tokens / tokens (DAPO, section 3.3)
    token-sum               Σ over tokens / 1
    seq-mean-token-sum      Σ over tokens of each row / rows (Dr.GRPO without its constant)
    seq-mean-token-mean     Σ over rows of the row's token mean / rows (GRPO, GSPO)
    seq-mean-token-sum-norm Σ over tokens of each row / horizon / rows (Dr.GRPO; horizon: tokens, the longest response
                            possible, not this batch's padding, which a micro-batch would change)

    Rows without a token that counts are not counted. `denominator` replaces what stands after the last slash.
    """
    check_shapes(loss_BT, mask_BT=mask_BT)
    _check_mode(mode)
    is_on_BT = mask_BT > 0
    if mode == "seq-mean-token-mean":
        total = sequence_mean(loss_BT, is_on_BT).sum()
    elif mode == "seq-mean-token-sum-norm":
        if horizon is None or horizon <= 0:
            raise ValueError(f"horizon: {horizon}; {mode} needs the greatest response length, in tokens")
        total = (sequence_sum(loss_BT, is_on_BT) / horizon).sum()
    else:
        total = only(loss_BT, is_on_BT).sum()
    if denominator is None:
        denominator = denominator_share(mask_BT, mode)
    divisor = torch.as_tensor(denominator, dtype=torch.float32, device=total.device)
    return total / torch.where(divisor > 0, divisor, 1.0)


def denominator_share(mask_BT: Tensor, mode: str) -> Tensor:
    """What these rows add to the global denominator: tokens, or rows with a token, or for token-sum 0.

    A global denominator of 0 divides by 1: that is token-sum, or a batch without a token that counts.
    """
    _check_mode(mode)
    is_on_BT = mask_BT > 0
    if mode == "token-mean":
        return is_on_BT.sum().float()
    if mode == "token-sum":
        return torch.zeros((), device=mask_BT.device)
    return is_on_BT.any(dim=1).sum().float()


def _check_mode(mode: str) -> None:
    if mode not in AGGREGATIONS:
        raise ValueError(f"aggregation: {mode!r}; must be one of {', '.join(AGGREGATIONS)}")
