"""Which rows of a batch a step trains on, where an update has several. The same groups whichever rank holds them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flowrl.trainer.gathering import gather_values
from flowrl.trainer.packing import Sample


def minibatches(
    samples: Sequence[Sample], num_minibatches: int, num_epochs: int, *, seed: Sequence[int]
) -> list[list[int]]:
    """On every rank: places in this rank's `samples`, for each step of each epoch. Some may be empty here.

    An epoch deals all groups out anew, in an order drawn from `seed` and the groups' numbers alone; groups stay whole.
    """
    if num_minibatches == num_epochs == 1:
        return [list(range(len(samples)))]
    number_B = torch.tensor([sample.key.group for sample in samples], dtype=torch.int64)
    everywhere, _ = gather_values(number_B[None])
    groups = np.unique(everywhere[0].numpy())
    dealt = []
    for epoch in range(num_epochs):
        order = np.random.default_rng((*seed, epoch)).permutation(len(groups))
        for part in np.array_split(order, num_minibatches):
            chosen = set(groups[part].tolist())
            dealt.append([place for place, sample in enumerate(samples) if sample.key.group in chosen])
    return dealt
