"""What an episode makes: a trajectory, written turn by turn in a transcript. Token in, token out: what the model wrote
stays as the engine gave it and is never tokenised again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowrl.rollout.engine import FinishReason, Generation
from flowrl.rollout.experts import joined_experts


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """tokens: int32 (T,), all that followed the prompt. mask: uint8 (T,), 1 where the model wrote it. logprobs: float32
    (T,) and versions: int32 (T,), the engine's; of tokens that the model did not write, 0 and the version of the token
    before. finish_reason: STOP, LENGTH when room or turns ran out, ABORT. reward: the episode's own. prompt: what the
    engine saw, where that is not the data set's. routed_experts: int32 (prompt + T - 1, layers, experts), where the
    engine says them."""

    tokens: np.ndarray
    mask: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: FinishReason
    reward: float | None = None
    prompt: tuple[int, ...] | None = None
    num_turns: int = 1
    routed_experts: np.ndarray | None = None

    def spans(self) -> list[tuple[int, int]]:
        """What the model wrote, in runs of one version: [(version, tokens), …]."""
        written = self.versions[self.mask.astype(bool)]
        if not len(written):
            return []
        starts = np.flatnonzero(np.diff(written, prepend=written[0] - 1))
        lengths = np.diff(starts, append=len(written))
        return [(int(written[start]), int(length)) for start, length in zip(starts, lengths, strict=True)]


def last_turn(tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What the model wrote after all that it read: its answer."""
    read = np.flatnonzero(np.asarray(mask) == 0)
    return tokens[read[-1] + 1 :] if len(read) else tokens


class Transcript:
    """The conversation so far, as tokens. `prompt`: where it began. `max_tokens`: of all that may follow."""

    def __init__(self, prompt: Sequence[int], max_tokens: int) -> None:
        self.prompt = tuple(prompt)
        self.max_tokens = max_tokens
        self.num_turns = 0
        self.finish_reason = FinishReason.LENGTH
        self._parts: list[Generation] = []
        self._is_written: list[bool] = []

    @property
    def num_tokens(self) -> int:
        """Of what followed the prompt."""
        return sum(len(part.tokens) for part in self._parts)

    @property
    def room(self) -> int:
        return self.max_tokens - self.num_tokens

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and all that followed: what the engine is to continue."""
        return sum((tuple(part.tokens.tolist()) for part in self._parts), self.prompt)

    @property
    def last_token(self) -> int:
        return int(self._parts[-1].tokens[-1])

    def write(self, generation: Generation) -> None:
        """The model's next turn."""
        self._parts.append(generation)
        self._is_written.append(True)
        self.num_turns += 1
        self.finish_reason = generation.finish_reason

    def read(self, tokens: Sequence[int]) -> bool:
        """What somebody else said. False, and nothing said, if no token of the model's would fit behind it."""
        assert self._parts, "the model writes first"
        if len(tokens) >= self.room:
            self.finish_reason = FinishReason.LENGTH
            return False
        said = np.array(tokens, dtype=np.int32)
        version = np.full(len(said), self._parts[-1].versions[-1], dtype=np.int32)
        none = np.zeros(len(said), dtype=np.float32)
        part = Generation(tokens=said, logprobs=none, versions=version, finish_reason=FinishReason.STOP)
        self._parts.append(part)
        self._is_written.append(False)
        return True

    def trajectory(self, reward: float | None = None) -> Trajectory:
        """All that followed the prompt. What was said after the model's last turn is no part of it."""
        parts, is_written = self._parts, self._is_written
        if is_written and not is_written[-1]:
            parts, is_written = parts[:-1], is_written[:-1]
        assert parts, "the model wrote nothing"
        lengths = [len(part.tokens) for part in parts]
        return Trajectory(
            tokens=np.concatenate([part.tokens for part in parts]),
            mask=np.repeat(np.array(is_written, dtype=np.uint8), lengths),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            versions=np.concatenate([part.versions for part in parts]),
            finish_reason=self.finish_reason,
            reward=reward,
            prompt=self.prompt,
            num_turns=self.num_turns,
            routed_experts=joined_experts(parts, len(self.prompt) + sum(lengths)),
        )
