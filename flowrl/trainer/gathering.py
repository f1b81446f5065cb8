"""Numbers of all ranks on every rank: for what depends on the whole batch. Collectives, so every rank must call.

Sums are added in rank order in float64: all ranks get the same number, and rounding does not show in float32.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl.algorithms.advantages import WHITEN_EPS
from flowrl.algorithms.masked import only


def gather_values(x_KN: Tensor) -> tuple[Tensor, int]:
    """x_KN of all ranks side by side, (K, total), and where this rank's begin. N may differ, K may not."""
    count = torch.tensor([x_KN.shape[1]])
    counts = [torch.empty_like(count) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, count)
    sizes = [int(each) for each in counts]
    padded = torch.nn.functional.pad(x_KN, (0, max(sizes) - x_KN.shape[1])).contiguous()
    gathered = [torch.empty_like(padded) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, padded)
    whole = torch.cat([part[:, :size] for part, size in zip(gathered, sizes, strict=True)], dim=1)
    return whole, sum(sizes[: dist.get_rank()])


def global_moments(x_N: Tensor) -> tuple[float, float]:
    """Mean and unbiased variance of all ranks' values; (0, 0) for none, exactly 0 variance if all are equal."""
    x_N = x_N.double()
    smallest = _over_ranks(torch.tensor([x_N.min() if len(x_N) else torch.inf], dtype=torch.float64)).min()
    pivot = smallest if bool(smallest.isfinite()) else torch.zeros_like(smallest)
    offset_N = x_N - pivot
    count, total = _over_ranks(torch.tensor([float(len(x_N)), offset_N.sum()], dtype=torch.float64)).sum(0)
    mean = total / count.clamp(min=1)
    squares = _over_ranks((offset_N - mean).square().sum()[None]).sum()
    return float(pivot + mean), float(squares / (count - 1).clamp(min=1))


def global_whiten(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """`advantages.whiten` over the tokens of all ranks."""
    is_on_BT = mask_BT > 0
    mean, variance = global_moments(x_BT[is_on_BT])
    white_BT = (x_BT.double() - mean) / (variance + WHITEN_EPS) ** 0.5
    return only(white_BT, is_on_BT)


def _over_ranks(values: Tensor) -> Tensor:
    """(ranks, K)."""
    gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, values)
    return torch.stack(gathered)
