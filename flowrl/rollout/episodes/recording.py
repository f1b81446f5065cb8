"""`RecordingEngine`: an engine that keeps what it was asked and what it said. For checking episodes."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from flowrl.rollout.engine import Capabilities, Engine, EngineError, GenerateRequest, Generation, PauseMode
from flowrl.rollout.episodes.trajectory import Trajectory


class RecordingEngine:
    """said: every finished request with its generation. running: requests under way. engine_s: time spent in them,
    added up. fails: whether `generate` raises an EngineError from now on."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.said: list[tuple[GenerateRequest, Generation]] = []
        self.running: set[str] = set()
        self.engine_s = 0.0
        self.fails = False

    @property
    def version(self) -> int:
        return self.engine.version

    @property
    def capabilities(self) -> Capabilities:
        return self.engine.capabilities

    async def start(self, path: Path, version: int) -> None:
        await self.engine.start(path, version)

    async def generate(self, request: GenerateRequest) -> Generation:
        if self.fails:
            raise EngineError("the engine fails, for a test")
        self.running.add(request.request_id)
        started = time.monotonic()
        try:
            generation = await self.engine.generate(request)
        finally:
            self.running.discard(request.request_id)
            self.engine_s += time.monotonic() - started
        self.said.append((request, generation))
        return generation

    async def abort(self, request_id: str | None = None) -> None:
        await self.engine.abort(request_id)

    async def pause(self, mode: PauseMode) -> None:
        await self.engine.pause(mode)

    async def resume(self) -> None:
        await self.engine.resume()

    async def load_weights(self, path: Path, version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        await self.engine.load_weights(path, version, mode)

    async def release_memory(self) -> None:
        await self.engine.release_memory()

    async def resume_memory(self) -> None:
        await self.engine.resume_memory()

    async def close(self) -> None:
        await self.engine.close()

    def disagreement(self, trajectory: Trajectory, prompt: tuple[int, ...]) -> str:
        """What in the trajectory is not what this engine said; empty if all is. prompt: the data set's."""
        start = trajectory.prompt if trajectory.prompt is not None else prompt
        whole = np.array([*start, *trajectory.tokens.tolist()], dtype=np.int64)
        unsaid = trajectory.mask.astype(bool)
        for request, generation in self.said:
            begin = len(request.tokens) - len(start)
            place = slice(begin, begin + len(generation.tokens))
            if begin < 0 or not np.array_equal(whole[: len(request.tokens)], request.tokens):
                continue
            columns = (trajectory.tokens, trajectory.logprobs, trajectory.versions)
            said = (generation.tokens, generation.logprobs, generation.versions)
            if all(np.array_equal(mine[place], its) for mine, its in zip(columns, said, strict=True)):
                unsaid[place] = False
        if unsaid.any():
            at = int(np.flatnonzero(unsaid)[0])
            return (
                f"token {at} has mask 1, but the engine did not write it there: tokens, logprobs and versions must be "
                "a generation's own, behind the very tokens that the engine was given"
            )
        if np.any(trajectory.logprobs[trajectory.mask == 0]):
            return "tokens that the model did not write (mask 0) must have logprobs 0"
        return ""
