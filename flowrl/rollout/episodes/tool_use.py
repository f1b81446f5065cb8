"""Several turns: the model calls tools, reads what they answer, and goes on until it calls none."""

from __future__ import annotations

import asyncio

from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes.context import EpisodeContext
from flowrl.rollout.episodes.trajectory import Trajectory


async def multi_turn(context: EpisodeContext) -> Trajectory:
    """Calls of one turn run at once and are answered in their order. Ends with LENGTH when the model still calls after
    `rollout.max_turns`, or when the answers do not fit."""
    transcript = context.begin()
    for turn in range(context.settings.max_turns):
        text = await context.write(transcript)
        calls = context.parse_calls(text)
        if not calls or transcript.finish_reason is FinishReason.ABORT:
            return transcript.trajectory()
        if turn + 1 == context.settings.max_turns:
            break
        answers = await asyncio.gather(*(context.toolbox.answer(call) for call in calls))
        limit = context.settings.tool_output_tokens
        cut = [{**answer, "content": context.encoder.truncate(answer["content"], limit)} for answer in answers]
        if not context.reply(transcript, cut):
            break
    transcript.finish_reason = FinishReason.LENGTH
    return transcript.trajectory()
