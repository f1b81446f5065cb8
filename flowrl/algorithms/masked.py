"""Arithmetic over the tokens that count. Owns sums, means and spreads under a mask; knows no algorithm.

`is_on_BT` is boolean: True on tokens that count.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_LOGRATIO = 20.0


def only(x_BT: Tensor, is_on_BT: Tensor) -> Tensor:
    """float32 values on tokens that count, 0 elsewhere. Fills, not multiplies: NaN in the padding must not survive."""
    return x_BT.float().masked_fill(~is_on_BT, 0.0)


def masked_mean(x_BT: Tensor, is_on_BT: Tensor) -> Tensor:
    """Mean over tokens that count, a scalar; 0 if none does."""
    return only(x_BT, is_on_BT).sum() / is_on_BT.sum().clamp(min=1)


def sequence_sum(x_BT: Tensor, is_on_BT: Tensor) -> Tensor:
    """Sum of each row, (B, 1)."""
    return only(x_BT, is_on_BT).sum(dim=1, keepdim=True)


def sequence_mean(x_BT: Tensor, is_on_BT: Tensor) -> Tensor:
    """Mean of each row, (B, 1); 0 for a row without tokens."""
    return sequence_sum(x_BT, is_on_BT) / is_on_BT.sum(dim=1, keepdim=True).clamp(min=1)


def bounded_exp(logratio: Tensor) -> Tensor:
    """exp of a log-ratio clamped to ±20; beyond the clamp the gradient is 0."""
    return logratio.clamp(-MAX_LOGRATIO, MAX_LOGRATIO).exp()


def centre(x: Tensor, is_on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> (x minus its masked mean, 0 where masked; the mean; the unbiased variance, 0 for fewer than two values).

    Values are taken relative to the smallest one before averaging: equal values then give exactly 0, which the plain
    float32 mean does not, and dividing its rounding error by a tiny deviation would turn it into signal.
    """
    if not x.numel():
        nothing = torch.zeros((), device=x.device)
        return x.float(), nothing, nothing
    count = is_on.sum()
    smallest = x.float().masked_fill(~is_on, torch.inf).amin()
    pivot = torch.where(count > 0, smallest, 0.0)
    offset = only(x - pivot, is_on)
    offset_mean = offset.sum() / count.clamp(min=1)
    centred = only(offset - offset_mean, is_on)
    variance = centred.square().sum() / (count - 1).clamp(min=1)
    return centred, pivot + offset_mean, variance


def check_shapes(like: Tensor, **tensors: Tensor) -> None:
    """Raises ValueError, by name, for a tensor whose shape is not that of `like`."""
    for name, tensor in tensors.items():
        if tensor.shape != like.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}; must be {tuple(like.shape)}, like its peers")
