"""What an episode gets: the engine, the prompt and the data behind it, text <-> tokens, tools, the environment."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flowrl.config.rollout import RolloutConfig
from flowrl.data.example import Example, Message
from flowrl.data.prompts import PromptEncoder
from flowrl.rollout.engine import Engine, GenerateRequest
from flowrl.rollout.environments.environment import Environments
from flowrl.rollout.episodes.trajectory import Trajectory, Transcript
from flowrl.rollout.failure import EpisodeFailed
from flowrl.rollout.tools.calls import ToolCall, Unreadable
from flowrl.rollout.tools.tool import Toolbox
from flowrl.rollout.user_code import UserCode

Episode = Callable[["EpisodeContext"], Coroutine[Any, Any, Trajectory]]


@dataclass(frozen=True, kw_only=True)
class EpisodeContext:
    """request: the prompt's tokens and how to sample. example: the row of the data set. settings: the recipe's
    `rollout`. user_code: calls functions that may take long, apart from the rollout loop. toolbox, parse_calls: the
    recipe's tools, and how calls of them are found in a text. environments: makes them, if the recipe names one."""

    engine: Engine
    request: GenerateRequest
    example: Example
    encoder: PromptEncoder
    settings: RolloutConfig
    user_code: UserCode
    toolbox: Toolbox
    parse_calls: Callable[[str], list[ToolCall | Unreadable]]
    environments: Environments | None = None

    def begin(self, prompt: Sequence[Message] | None = None) -> Transcript:
        """A transcript of nothing yet. prompt: messages in place of the data set's prompt; one that is longer than
        `data.max_prompt_tokens` fails the episode."""
        tokens = self.request.tokens
        if prompt is not None:
            tokens = self.encoder.encode(list(prompt))
            if len(tokens) > self.encoder.max_prompt_tokens:
                limit = f"data.max_prompt_tokens={self.encoder.max_prompt_tokens}"
                raise EpisodeFailed("prompt_too_long", f"{len(tokens)} tokens, {limit}")
        return Transcript(tokens, self.request.sampling.max_tokens)

    async def write(self, transcript: Transcript) -> str:
        """Has the model write its next turn; its text, special tokens included but not the one that ended it. The turn
        ends at a stop token, at `rollout.turn_tokens` or where the room does."""
        generation = await self.engine.generate(self.turn_request(transcript))
        transcript.write(generation)
        return self.encoder.decode_turn(generation.tokens)

    def turn_request(self, transcript: Transcript) -> GenerateRequest:
        """Every turn has a name and a seed of its own, the first those of the request."""
        turn, sampling = transcript.num_turns, self.request.sampling
        most = min(transcript.room, self.settings.turn_tokens or transcript.room)
        seed = sampling.seed if not turn or sampling.seed is None else seed_of_turn(sampling.seed, turn)
        return GenerateRequest(
            request_id=f"{self.request.request_id}.turn{turn}" if turn else self.request.request_id,
            tokens=transcript.tokens,
            sampling=dataclasses.replace(sampling, max_tokens=most, seed=seed),
        )

    def reply(self, transcript: Transcript, messages: Sequence[Message]) -> bool:
        """Says `messages` to the model, through its chat template; False if they do not fit."""
        return transcript.read(self.encoder.encode_reply(messages, transcript.last_token))


def seed_of_turn(seed: int, turn: int) -> int:
    """Other random numbers than those of the turns before."""
    return int(np.random.SeedSequence((seed, turn)).generate_state(1, np.uint64)[0] >> np.uint64(1))
