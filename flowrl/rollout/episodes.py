"""An episode turns one prompt into one trajectory. What is here: a single turn. Yours: `rollout.episode` in the recipe.

An episode is `async (engine, request) -> Trajectory`. It may call the engine several times; it says with `mask` which
tokens the model wrote, and passes on the engine's log-probs and versions for those.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import numpy as np

from flowrl.rollout.engine import Engine, FinishReason, GenerateRequest


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """tokens: int32 (T,), all that followed the prompt. mask: uint8 (T,), 1 where the model wrote it. logprobs: float32
    (T,) and versions: int32 (T,), the engine's; of tokens that the model did not write, 0 and the version in force."""

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: FinishReason

    def spans(self) -> list[tuple[int, int]]:
        """Runs of one version: [(version, tokens), …]."""
        if not len(self.versions):
            return []
        starts = np.flatnonzero(np.diff(self.versions, prepend=self.versions[0] - 1))
        lengths = np.diff(starts, append=len(self.versions))
        return [(int(self.versions[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


Episode = Callable[[Engine, GenerateRequest], Awaitable[Trajectory]]


async def single_turn(engine: Engine, request: GenerateRequest) -> Trajectory:
    """One response to one prompt."""
    generation = await engine.generate(request)
    return Trajectory(
        tokens=generation.tokens,
        mask=np.ones(len(generation.tokens), dtype=np.uint8),
        logprobs=generation.logprobs,
        versions=generation.versions,
        finish_reason=generation.finish_reason,
    )
