"""How long an update keeps 64 running requests waiting and what becomes of their tokens, by what it does to them.

    python benchmarks/weight_update_pause.py [--sglang-python .venv-sglang/bin/python] [--updates 20] [--out RESULT]

The model is that of `engine.py`. 64 requests of 1,024 tokens are always running: an ended one is followed by another.
Every half second new weights come from a directory, in turn from two of random weights. The pause is the engine's call,
from the order to load until it returns with requests running again. What a pause leaves to do later (KV to compute
again) shows in `cost_ms`: by how much an update lengthens the time to generate as many tokens as without updates.

Under `abort` a request ends with what it has, and is sent again with those tokens behind its prompt, as a rollout does
(`rollout.in_flight: abort`). Tokens lost are those that a response is short of its 1,024 without having been aborted,
or that came without a log-prob or a version: every mode should lose none. `error`: the largest difference of a token's
log-prob from that of a Hugging Face forward over the whole response with the weights of the token's version, of eight
responses; `error_first`: of those tokens that came before the first update after their response's begin.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from flowrl.rollout.engine import Engine, FinishReason, GenerateRequest, Generation, PauseMode, SamplingParams

NUM_RUNNING = 64
LENGTH = 1024
EVERY_S = 0.5
NUM_JUDGED = 8


def main() -> None:
    given = parse()
    shared = engine_benchmark()
    torch.set_num_threads(shared.THREADS)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("a", "b")]
        for seed, path in enumerate(paths):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(shared.qwen3(shared.CPU)).save_pretrained(path)
        engines: dict[str, Any] = {"embedded": lambda: shared.embedded_engine(shared.CPU)}
        if given.sglang_python is not None:
            engines["sglang"] = lambda: shared.sglang_engine(given.sglang_python, shared.CPU, Path(folder))
        rows = [
            row for name, make in engines.items() for row in asyncio.run(measure(name, make(), paths, given.updates))
        ]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": shared.commit(),
        "running": NUM_RUNNING,
        "threads": shared.THREADS,
        "load_average": os.getloadavg()[0],
        "pauses": rows,
    }
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python", type=Path, help="interpreter of the environment that has SGLang")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def engine_benchmark() -> ModuleType:
    """`engine.py` beside this file, whatever else is called `engine`."""
    spec = importlib.util.spec_from_file_location("engine_benchmark", Path(__file__).with_name("engine.py"))
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def measure(name: str, engine: Engine, paths: list[Path], num_updates: int) -> list[dict[str, Any]]:
    await engine.start(paths[0], 0)
    try:
        rate, judge = await without_updates(engine, num_updates), Judge(paths)
        return [{"engine": name, **await of_mode(engine, mode, num_updates, rate, judge)} for mode in PauseMode]
    finally:
        await engine.close()


async def without_updates(engine: Engine, num_updates: int) -> float:
    """Tokens a second."""
    running = Running(engine)
    async with running.kept_going():
        await asyncio.sleep(EVERY_S * (num_updates + 1))
    return running.num_tokens / running.seconds


async def of_mode(engine: Engine, mode: PauseMode, num_updates: int, rate: float, judge: Judge) -> dict[str, Any]:
    """rate: tokens a second without updates."""
    running = Running(engine)
    pauses = []
    async with running.kept_going():
        await asyncio.sleep(EVERY_S)
        for _ in range(num_updates):
            version = engine.version + 1
            begun = time.perf_counter()
            await engine.load_weights(judge.path(version), version, mode)
            pauses.append(time.perf_counter() - begun)
            await asyncio.sleep(EVERY_S)
    ordered = sorted(pauses)
    cost_s = (running.seconds - running.num_tokens / rate) / num_updates
    errors = [judge.errors(response) for response in running.newest[:NUM_JUDGED]]
    found = {
        "mode": mode.value,
        "updates": num_updates,
        "p50_ms": round(1e3 * statistics.median(ordered), 1),
        "p95_ms": round(1e3 * ordered[math.ceil(0.95 * len(ordered)) - 1], 1),
        "cost_ms": round(1e3 * cost_s),
        "tokens": running.num_tokens,
        "tokens_lost": running.num_lost,
        "resumed": running.num_resumed,
        "versions_a_response": round(statistics.mean(len(set(one.versions)) for one in running.newest), 1),
        "error": float(f"{max(whole for whole, _ in errors):.2g}"),
        "error_first": float(f"{max(first for _, first in errors):.2g}"),
    }
    print(found, flush=True)
    return found


@dataclass
class Response:
    """One of a request, so far."""

    prompt: tuple[int, ...]
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)

    def add(self, made: Generation) -> None:
        self.tokens += made.tokens.tolist()
        self.logprobs += made.logprobs.tolist()
        self.versions += made.versions.tolist()


class Judge:
    """Which weights a version is, and what a forward with them says."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in paths]

    def path(self, version: int) -> Path:
        """Where a version's weights are."""
        return self._paths[version % len(self._paths)]

    @torch.inference_mode()
    def errors(self, response: Response) -> tuple[float, float]:
        """Of all tokens, and of those of the first version."""
        ids = torch.tensor([[*response.prompt, *response.tokens]])
        targets = ids[0, len(response.prompt) :, None]
        logits = [model(ids).logits[0, len(response.prompt) - 1 : -1] for model in self._models]
        by_model = torch.stack([one.log_softmax(-1).gather(1, targets)[:, 0] for one in logits])
        versions = torch.tensor(response.versions)
        expected = by_model[versions % len(self._models), torch.arange(len(versions))]
        error = (expected - torch.tensor(response.logprobs)).abs()
        return float(error.max()), float(error[versions == versions[0]].max())


class Running:
    """Requests that are always there, and what became of their tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_over = False
        self.num_tokens = self.num_lost = self.num_resumed = 0
        self.seconds = 0.0
        self.newest: list[Response] = []

    @asynccontextmanager
    async def kept_going(self) -> AsyncIterator[None]:
        begun = time.perf_counter()
        tasks = [asyncio.create_task(self._keep_going(place)) for place in range(NUM_RUNNING)]
        yield
        self.is_over = True
        self.seconds = time.perf_counter() - begun
        await self.engine.abort()
        await asyncio.gather(*tasks)

    async def _keep_going(self, place: int) -> None:
        turn = 0
        while not self.is_over:
            prompt = tuple((place * 37 + turn * 11 + offset) % 8192 for offset in range(24))
            turn += 1
            response = Response(prompt)
            while len(response.tokens) < LENGTH and not self.is_over:
                made = await self.engine.generate(
                    GenerateRequest(
                        request_id=f"{place}.{turn}.{len(response.tokens)}",
                        tokens=(*prompt, *response.tokens),
                        sampling=SamplingParams(max_tokens=LENGTH - len(response.tokens)),
                    )
                )
                self.num_lost += len(made.tokens) - min(len(made.logprobs), len(made.versions))
                response.add(made)
                if made.finish_reason is FinishReason.ABORT:
                    self.num_resumed += 1
                elif len(response.tokens) < LENGTH:
                    self.num_lost += LENGTH - len(response.tokens)
            self.num_tokens += len(response.tokens)
            if self.is_over and response.tokens:
                self.newest.append(response)


if __name__ == "__main__":
    main()
