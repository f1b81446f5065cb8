"""What tests of episodes stand on: a small recipe with a real tokenizer, and an engine that says what it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.config import ModelInitConfig, Recipe, load
from flowrl.data.datasets import load_splits
from flowrl.model_init import create_model
from flowrl.rollout.engine import (
    Capabilities,
    FinishReason,
    GenerateRequest,
    Generation,
    PauseMode,
    SamplingParams,
)
from flowrl.rollout.episodes.runner import EpisodeRunner

ALPHABET = "".join(chr(code) for code in range(32, 127)) + "\n"
MAX_TOKENS = 400


def make_model(path: Path) -> Path:
    """A small model that can write every ASCII character."""
    if not path.exists():
        init = ModelInitConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64, max_tokens=1024)
        create_model(path, init, [ALPHABET, "1+2="])
    return path


def make_recipe(directory: Path, model: Path, *overrides: str, num_rows: int = 4) -> Recipe:
    rows = [{"prompt": f"{n}+{n}=", "ground_truth": str(2 * n)} for n in range(1, num_rows + 1)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text("run: {name: test}\n")
    given = (f"model.path={model}", f"data.path={directory}/data.jsonl", f"rollout.max_tokens={MAX_TOKENS}")
    reward = () if any(one.startswith("reward.") for one in overrides) else ("reward.name=exact_match",)
    return load(directory / "recipe.yaml", [*given, *reward, *overrides])


def requests_of(recipe: Recipe, runner: EpisodeRunner) -> list[tuple[GenerateRequest, Any]]:
    """A request for every row of the data, and the row."""
    examples = load_splits(recipe.data, recipe.eval).train
    sampling = SamplingParams(
        max_tokens=recipe.rollout.max_tokens, stop_token_ids=runner.encoder.stop_token_ids, seed=7
    )
    return [
        (GenerateRequest(request_id=str(at), tokens=runner.encoder.encode(one.prompt), sampling=sampling), one)
        for at, one in enumerate(examples)
    ]


class ScriptedEngine:
    """Says the texts of `script` in turn, a request's n-th turn the n-th of them, and ends each with the stop token.
    `seconds`: how long a turn takes. Log-probs are all -0.5; every token names the version in force."""

    def __init__(self, runner: EpisodeRunner, script: Sequence[str] | Callable[[GenerateRequest], str]) -> None:
        self.encoder = runner.encoder
        self.script = script
        self.seconds = 0.0
        self.version = 3
        self.requests: list[GenerateRequest] = []
        self.written: list[Generation] = []
        self.num_running = 0

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(max_model_tokens=4096)

    async def start(self, path: Path, version: int) -> None:
        self.version = version

    async def generate(self, request: GenerateRequest) -> Generation:
        self.requests.append(request)
        text = self.script(request) if callable(self.script) else self.script[turn_of(request)]
        self.num_running += 1
        try:
            await asyncio.sleep(self.seconds)
        finally:
            self.num_running -= 1
        tokens = self.encoder.encode_response(text)
        most = request.sampling.max_tokens
        reason = FinishReason.STOP if len(tokens) <= most else FinishReason.LENGTH
        written = np.array(tokens[:most], dtype=np.int32)
        generation = Generation(
            tokens=written,
            logprobs=np.full(len(written), -0.5, dtype=np.float32),
            versions=np.full(len(written), self.version, dtype=np.int32),
            finish_reason=reason,
        )
        self.written.append(generation)
        return generation

    async def abort(self, request_id: str | None = None) -> None: ...

    async def pause(self, mode: PauseMode) -> None: ...

    async def resume(self) -> None: ...

    async def load_weights(self, path: Path, version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        self.version = version

    async def release_memory(self) -> None: ...

    async def resume_memory(self) -> None: ...

    async def close(self) -> None: ...


def turn_of(request: GenerateRequest) -> int:
    _, _, turn = request.request_id.partition(".turn")
    return int(turn or 0)
