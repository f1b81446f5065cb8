"""Which prompt a group stands for: a pure function of the group's number, so that every process computes the same."""

from __future__ import annotations

import functools

import numpy as np


def prompt_at(group: int, size: int, seed: int) -> int:
    """Position, in [0, size), of the prompt of `group`. Each epoch of `size` groups visits every prompt once, in an
    order of its own.

    Raises ValueError if there is no prompt or the number is negative.
    """
    if size < 1:
        raise ValueError(f"size: {size}; a data set needs at least one prompt")
    if group < 0:
        raise ValueError(f"group: {group}; must not be negative")
    epoch, place = divmod(group, size)
    return int(_permutation(size, seed, epoch)[place])


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(size)
