"""`ResumingEngine`: an engine whose responses outlive a weight update that aborts them.

    load_weights(ABORT) -> the engine ends its requests -> each goes on from its own tokens, under the new weights

Tokens, log-probs and versions of before stay as they are; what follows is sampled and computed under the new weights
alone. Whoever asks for an abort gets one; only those that an update or a pause brings are resumed. Stop strings and
repetition penalties, which look back on a response, are refused.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import cast

import numpy as np

from flowrl.rollout.engine import (
    Capabilities,
    Engine,
    Fill,
    FillableEngine,
    FinishReason,
    GenerateRequest,
    Generation,
    PauseMode,
)
from flowrl.rollout.experts import joined_experts


class ResumingEngine:
    """As the engine that it wraps, but for responses that an update aborts."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._running: dict[str, _Running] = {}
        self._is_open = asyncio.Event()
        self._is_open.set()

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def capabilities(self) -> Capabilities:
        return self.engine.capabilities

    async def start(self, path: Path, version: int) -> None:
        await self.engine.start(path, version)

    async def generate(self, request: GenerateRequest) -> Generation:
        name, sampling = request.request_id, request.sampling
        if sampling.stop_strings or sampling.repetition_penalty != 1:
            raise ValueError("stop_strings, repetition_penalty: look back on a response, which may have to be resumed")
        if name in self._running:
            raise ValueError(f"request_id: {name!r} is running; it must be unique among running requests")
        running = self._running[name] = _Running(request)
        try:
            while not running.has_ended:
                await self._is_open.wait()
                if running.is_aborted:
                    break
                running.add(await self.engine.generate(running.rest()))
            return running.generation()
        finally:
            del self._running[name]

    async def abort(self, request_id: str | None = None) -> None:
        for name, running in self._running.items():
            if request_id is None or name == request_id:
                running.is_aborted = True
        await self.engine.abort(request_id)
        if request_id is None:
            self._is_open.set()

    async def pause(self, mode: PauseMode) -> None:
        if mode is PauseMode.ABORT:
            self._is_open.clear()
        await self.engine.pause(mode)

    async def resume(self) -> None:
        await self.engine.resume()
        self._is_open.set()

    async def load_weights(self, path: Path | Fill, version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        """Those that are aborted wait until the new weights are there. A `Fill` only for an engine that takes it."""
        engine = cast("FillableEngine", self.engine)
        if mode is not PauseMode.ABORT or not self._is_open.is_set():
            return await engine.load_weights(path, version, mode)
        self._is_open.clear()
        try:
            await engine.load_weights(path, version, mode)
        finally:
            self._is_open.set()

    async def release_memory(self) -> None:
        await self.engine.release_memory()

    async def resume_memory(self) -> None:
        await self.engine.resume_memory()

    async def close(self) -> None:
        await self.engine.close()


class _Running:
    """A request and the parts of its response so far."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.parts: list[Generation] = []
        self.is_aborted = False

    @property
    def has_ended(self) -> bool:
        return self.is_aborted or (bool(self.parts) and self.parts[-1].finish_reason is not FinishReason.ABORT)

    def add(self, part: Generation) -> None:
        self.parts.append(part)

    def rest(self) -> GenerateRequest:
        """What is still to be generated. Its random numbers are others than those of the part before."""
        written = [int(token) for part in self.parts for token in part.tokens]
        if not written:
            return self.request
        sampling = self.request.sampling
        seed = None
        if sampling.seed is not None:
            drawn = np.random.SeedSequence((sampling.seed, len(self.parts), len(written)))
            seed = int(drawn.generate_state(1, np.uint64)[0] >> np.uint64(1))
        return dataclasses.replace(
            self.request,
            tokens=(*self.request.tokens, *written),
            sampling=dataclasses.replace(sampling, max_tokens=sampling.max_tokens - len(written), seed=seed),
        )

    def generation(self) -> Generation:
        """One of all parts; empty if it was aborted before it began."""
        empty = Generation(
            tokens=np.empty(0, np.int32),
            logprobs=np.empty(0, np.float32),
            versions=np.empty(0, np.int32),
            finish_reason=FinishReason.ABORT,
        )
        parts = self.parts or [empty]
        num_tokens = len(self.request.tokens) + sum(len(part.tokens) for part in parts)
        return Generation(
            tokens=np.concatenate([part.tokens for part in parts]),
            logprobs=np.concatenate([part.logprobs for part in parts]),
            versions=np.concatenate([part.versions for part in parts]),
            finish_reason=parts[-1].finish_reason,
            routed_experts=joined_experts(parts, num_tokens),
        )
