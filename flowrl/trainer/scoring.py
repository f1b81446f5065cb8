"""One number for every token of every response, from a model that is not being differentiated: log-probs, values.

Packed and split as in training, so that it costs what a forward pass costs. Free of collectives once the parameters are
gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from flowrl.trainer.packing import Packed, Sample, pack, split_by_tokens


@torch.no_grad()
def score_responses(
    forward: Callable[[Packed], torch.Tensor], samples: Sequence[Sample], budget: int, device: torch.device
) -> list[np.ndarray]:
    """For each sample float32 of the response's length, masked tokens included: `forward` gives x_R for what it is fed.

    budget: tokens of a micro-batch at most, as in `split_by_tokens`.
    """
    scores = [np.zeros(len(sample.response_tokens), np.float32) for sample in samples]
    places = [place for place, sample in enumerate(samples) if len(sample.response_tokens)]
    lengths = [len(samples[place].prompt_tokens) + len(samples[place].response_tokens) - 1 for place in places]
    for part in split_by_tokens(lengths, budget):
        chosen = [places[index] for index in part]
        packed = pack(
            [samples[place].prompt_tokens for place in chosen],
            [samples[place].response_tokens for place in chosen],
            [np.ones(len(samples[place].response_tokens), np.uint8) for place in chosen],
            device,
        )
        values = forward(packed).float().cpu().numpy()
        ends = np.cumsum([len(samples[place].response_tokens) for place in chosen])
        for place, value in zip(chosen, np.split(values, ends[:-1]), strict=True):
            scores[place] = value
    return scores
