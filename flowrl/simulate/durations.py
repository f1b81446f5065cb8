"""How long one response takes, in seconds."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


class Durations(Protocol):
    def draw(self, dice: random.Random) -> float: ...


@dataclass(frozen=True)
class Constant:
    seconds: float

    def draw(self, dice: random.Random) -> float:
        return self.seconds


@dataclass(frozen=True)
class LogNormal:
    """mean_s: of the durations, not of their logarithms. sigma: of the logarithms; 0 is constant, 1 is long-tailed.
    longest_s: where responses are cut off."""

    mean_s: float
    sigma: float
    longest_s: float = math.inf

    def __post_init__(self) -> None:
        if self.mean_s <= 0:
            raise ValueError(f"mean_s: {self.mean_s}; must be positive")
        if not 0 <= self.sigma <= 3:
            raise ValueError(f"sigma: {self.sigma}; must be from 0 to 3")
        if self.longest_s < self.mean_s:
            raise ValueError(f"longest_s: {self.longest_s}; must be at least mean_s, {self.mean_s}")

    def draw(self, dice: random.Random) -> float:
        mu = math.log(self.mean_s) - self.sigma**2 / 2
        return min(self.longest_s, dice.lognormvariate(mu, self.sigma))


class Measured:
    """Drawn from durations that were measured, with replacement."""

    def __init__(self, seconds: Sequence[float]) -> None:
        if not seconds or min(seconds) < 0:
            raise ValueError(f"seconds: {len(seconds)} durations; there must be some, and none negative")
        self.seconds = tuple(seconds)

    def draw(self, dice: random.Random) -> float:
        return dice.choice(self.seconds)
