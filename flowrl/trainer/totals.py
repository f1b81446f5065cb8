"""Scalars summed over an update: kept on the device while it runs, reduced over all ranks once at its end.

Every rank must have added the same names; values are read on the host only in `reduce`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.distributed as dist

from flowrl.trainer.world import World


class Totals:
    """Sums, in float64, and maxima, by name."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._maxima: dict[str, torch.Tensor] = {}

    def add(self, name: str, value: torch.Tensor | float) -> None:
        value = torch.as_tensor(value, dtype=torch.float64).detach()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def maximum(self, name: str, value: torch.Tensor) -> None:
        value = value.detach()
        self._maxima[name] = torch.maximum(self._maxima[name], value) if name in self._maxima else value

    def measure(self, name: str, values: np.ndarray) -> None:
        """For `spreads`: values on the host, possibly none."""
        values = values.astype(np.float64)
        self.add(f"{name}/count", float(values.size))
        self.add(f"{name}/sum", float(values.sum()))
        for extreme, found in (("max", values), ("-min", -values)):
            largest = float(found.max()) if values.size else -np.inf
            self.maximum(f"{name}/{extreme}", torch.tensor(largest, dtype=torch.float64))

    def reduce(self, world: World) -> dict[str, float]:
        """One collective: every rank gathers all ranks' scalars and adds them in the same order."""
        names = sorted(self._sums), sorted(self._maxima)
        values = [self._sums[name] for name in names[0]] + [self._maxima[name] for name in names[1]]
        local = torch.stack([value.to(world.device, torch.float64) for value in values])
        gathered = [torch.empty_like(local) for _ in range(world.size)]
        dist.all_gather(gathered, local)
        sums, maxima = torch.stack(gathered).split([len(names[0]), len(names[1])], dim=1)
        reduced = torch.cat([sums.sum(0), maxima.amax(0)]).tolist()
        return dict(zip(names[0] + names[1], reduced, strict=True))


def spreads(reduced: dict[str, float]) -> dict[str, float]:
    """Takes out what `measure` has added; mean, max and min of each, under the field's names. 0 of no values."""
    found: dict[str, float] = {}
    for name in [key.removesuffix("/-min") for key in reduced if key.endswith("/-min")]:
        count, total, high, low = (reduced.pop(f"{name}/{part}") for part in ("count", "sum", "max", "-min"))
        values = (total / count, high, -low) if count else (0.0, 0.0, 0.0)
        found |= dict(zip((f"{name}/mean", f"{name}/max", f"{name}/min"), values, strict=True))
    return found
