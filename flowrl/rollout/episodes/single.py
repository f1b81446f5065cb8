"""One response to one prompt."""

from __future__ import annotations

from flowrl.rollout.episodes.context import EpisodeContext
from flowrl.rollout.episodes.trajectory import Trajectory


async def single_turn(context: EpisodeContext) -> Trajectory:
    transcript = context.begin()
    await context.write(transcript)
    return transcript.trajectory()
