"""What a rollout engine is. One protocol, several engines, one conformance suite (`tests/rollout/`).

An engine turns token ids into token ids. It says of every token which weights sampled it and how likely it was; nobody
else may say so. It knows no prompts, rewards or queues.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np


class PauseMode(enum.Enum):
    """What happens to running requests at a pause. KEEP: they go on later with the KV they have. RECOMPUTE: they go on
    with KV rebuilt under the weights of that time. ABORT: they end now, with what they have."""

    KEEP = "keep"
    RECOMPUTE = "recompute"
    ABORT = "abort"


class FinishReason(enum.Enum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """temperature 0 is greedy. `stop_token_ids` end a response and are part of it; so does the token that completes one
    of `stop_strings` in the response's text. repetition_penalty: the logits of tokens that the response has already are
    divided by it, or multiplied where negative (Keskar et al. 2019, without the prompt); 1 turns it off."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_token_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: {self.max_tokens}; must be at least 1")
        if self.temperature < 0:
            raise ValueError(f"temperature: {self.temperature}; must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}; must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}; 0 turns it off, otherwise at least 1")
        if not 0 <= self.min_p < 1:
            raise ValueError(f"min_p: {self.min_p}; must be in [0, 1)")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty: {self.repetition_penalty}; must be positive, 1 turns it off")
        if "" in self.stop_strings:
            raise ValueError(f"stop_strings: {self.stop_strings}; an empty one would end every response at once")


@dataclass(frozen=True, kw_only=True)
class GenerateRequest:
    """`tokens`: the prompt. `request_id` is unique among running requests."""

    request_id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True)
class Generation:
    """tokens: int32 (T,). logprobs: float32 (T,), at the sampling temperature and after the repetition penalty, before
    top-p, top-k and min-p. versions: int32 (T,), the weights that sampled each token, as the engine says.
    routed_experts: int32 (prompt + T - 1, layers, experts a token), which experts of a mixture each token went through,
    prompt included, from an engine that was asked to say; the last token went through none."""

    tokens: np.ndarray
    logprobs: np.ndarray
    versions: np.ndarray
    finish_reason: FinishReason
    routed_experts: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """`max_model_tokens`: prompt and response together. `pause_modes`: those that `pause` takes. `releases_memory`:
    whether `release_memory` frees any. `routed_experts`: (layers, experts a token) of those that generations come with,
    None if they come with none."""

    max_model_tokens: int
    releases_memory: bool = False
    routed_experts: tuple[int, int] | None = None
    pause_modes: frozenset[PauseMode] = field(default_factory=lambda: frozenset(PauseMode))


class Engine(Protocol):
    """Used from one asyncio loop. `version` is that of the weights in force, -1 before the first."""

    @property
    def version(self) -> int: ...

    @property
    def capabilities(self) -> Capabilities: ...

    async def start(self, path: Path, version: int) -> None:
        """Loads the Hugging Face directory `path` as `version` and becomes ready."""
        ...

    async def generate(self, request: GenerateRequest) -> Generation:
        """Raises ValueError for a request the engine can never serve, EngineError if it fails underway."""
        ...

    async def abort(self, request_id: str | None = None) -> None:
        """Ends one request, or all; they return what they have, with FinishReason.ABORT."""
        ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def load_weights(self, path: Path, version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        """Replaces the weights by those of `path` between two decode steps. All of them, or an EngineError that says
        that the engine must be restarted."""
        ...

    async def release_memory(self) -> None:
        """Gives the device's memory to others: the KV cache, and the weights where the engine keeps a copy elsewhere.
        ValueError unless the engine is paused, with RECOMPUTE or ABORT. Until `resume_memory` it can be asked to
        generate and to abort; weights cannot be loaded, nor the pause changed or ended (ValueError)."""
        ...

    async def resume_memory(self) -> None:
        """Takes the memory again. The engine is as it was: the same weights, the same requests, paused."""
        ...

    async def close(self) -> None: ...


Fill = Callable[[Mapping[str, Any]], None]
"""Overwrites the tensors of a model's state, by name, in place."""


class FillableEngine(Protocol):
    """One that computes in this process, so that its weights can be written to."""

    async def load_weights(self, path: Path | Fill, version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        """As `Engine.load_weights`. If a function raises an error after it has begun to write, the engine must be
        restarted; that is for its caller to know."""
        ...


class EngineError(RuntimeError):
    """The engine failed; the message names it."""


def check_lendable(paused: PauseMode | None) -> None:
    """ValueError for an engine whose running requests still need their KV."""
    if paused not in (PauseMode.RECOMPUTE, PauseMode.ABORT):
        raise ValueError(f"release_memory: pause is {paused}; it must be PauseMode.RECOMPUTE or PauseMode.ABORT")
