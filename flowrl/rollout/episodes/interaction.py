"""Several turns against an environment of the user's: it says what the model reads, what a turn earns, and the end."""

from __future__ import annotations

from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes.context import EpisodeContext
from flowrl.rollout.episodes.trajectory import Trajectory


async def environment(context: EpisodeContext) -> Trajectory:
    """The reward is the sum of the steps'. Ends with STOP when the environment is done, with LENGTH after
    `rollout.max_turns`, or when an observation does not fit."""
    assert context.environments is not None, "the recipe names an environment"
    played = await context.environments.make(context.request.request_id)
    try:
        transcript = context.begin(await played.reset(context.example))
        reward = 0.0
        for _ in range(context.settings.max_turns):
            text = await context.write(transcript)
            if transcript.finish_reason is FinishReason.ABORT:
                break
            step = await played.step(text)
            reward += step.reward
            transcript.finish_reason = FinishReason.STOP if step.is_done else FinishReason.LENGTH
            if step.is_done or not context.reply(transcript, step.messages):
                break
        return transcript.trajectory(reward)
    finally:
        context.user_code.afterwards(played.close())
