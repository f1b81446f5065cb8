"""One response to one prompt."""

from __future__ import annotations

import numpy as np

from flowrl.rollout.episodes.context import EpisodeContext
from flowrl.rollout.episodes.trajectory import Trajectory


async def single_turn(context: EpisodeContext) -> Trajectory:
    """By the shortest way, without a transcript: most runs do nothing else, thousands of times a second."""
    generation = await context.engine.generate(context.request)
    return Trajectory(
        tokens=generation.tokens,
        mask=np.ones(len(generation.tokens), dtype=np.uint8),
        logprobs=generation.logprobs,
        versions=generation.versions,
        finish_reason=generation.finish_reason,
    )
