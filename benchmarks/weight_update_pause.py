"""How long a weight update keeps 64 running requests waiting, by what it does to them.

    python benchmarks/weight_update_pause.py [--sglang-python .venv-sglang/bin/python] [--updates 20] [--out RESULT]

The model is that of `engine.py`. 64 requests of 1,024 tokens are always running: an ended one is followed by another.
Every half second new weights come from a directory. The pause is the engine's call, from the order to load until it
returns with requests running again. Under `abort` a request ends with what it has, and is sent again with those tokens
behind its prompt, as a rollout does (`rollout.in_flight: abort`). Tokens lost are those that a response is short of its
1,024 without having been aborted, or that came without a log-prob or a version: every mode should lose none.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3Config

from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import Engine, FinishReason, GenerateRequest, PauseMode, SamplingParams

NUM_RUNNING = 64
LENGTH = 1024
EVERY_S = 0.5


def main() -> None:
    given = parse()
    shared = engine_benchmark()
    torch.set_num_threads(shared.THREADS)
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / name for name in ("a", "b")]
        for seed, path in enumerate(paths):
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(Qwen3Config(**shared.SHAPE)).save_pretrained(path)
        engines: dict[str, Any] = {"embedded": lambda: EmbeddedEngine(**shared.embedded_args())}
        if given.sglang_python is not None:
            engines["sglang"] = lambda: shared.sglang_engine(given.sglang_python, Path(folder))
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
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def measure(name: str, engine: Engine, paths: list[Path], num_updates: int) -> list[dict[str, Any]]:
    await engine.start(paths[0], 0)
    try:
        return [{"engine": name, **await of_mode(engine, mode, paths, num_updates)} for mode in PauseMode]
    finally:
        await engine.close()


async def of_mode(engine: Engine, mode: PauseMode, paths: list[Path], num_updates: int) -> dict[str, Any]:
    running = Running(engine)
    tasks = [asyncio.create_task(running.keep_going(place)) for place in range(NUM_RUNNING)]
    await asyncio.sleep(EVERY_S)
    pauses = []
    for number in range(num_updates):
        version = engine.version + 1
        begun = time.perf_counter()
        await engine.load_weights(paths[number % 2], version, mode)
        pauses.append(time.perf_counter() - begun)
        await asyncio.sleep(EVERY_S)
    running.is_over = True
    await engine.abort()
    await asyncio.gather(*tasks)
    ordered = sorted(pauses)
    found = {
        "mode": mode.value,
        "updates": num_updates,
        "p50_ms": round(1e3 * statistics.median(ordered), 1),
        "p95_ms": round(1e3 * ordered[int(0.95 * (len(ordered) - 1))], 1),
        "tokens": running.num_tokens,
        "tokens_lost": running.num_lost,
        "resumed": running.num_resumed,
    }
    print(found, flush=True)
    return found


class Running:
    """Requests that are always there, and what became of their tokens."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.is_over = False
        self.num_tokens = self.num_lost = self.num_resumed = 0

    async def keep_going(self, place: int) -> None:
        turn = 0
        while not self.is_over:
            prompt = tuple((place * 37 + turn * 11 + offset) % 8192 for offset in range(24))
            turn += 1
            response: tuple[int, ...] = ()
            while len(response) < LENGTH and not self.is_over:
                made = await self.engine.generate(
                    GenerateRequest(
                        request_id=f"{place}.{turn}.{len(response)}",
                        tokens=prompt + response,
                        sampling=SamplingParams(max_tokens=LENGTH - len(response)),
                    )
                )
                self.num_lost += len(made.tokens) - min(len(made.logprobs), len(made.versions))
                response += tuple(made.tokens.tolist())
                if made.finish_reason is FinishReason.ABORT:
                    self.num_resumed += 1
                elif len(response) < LENGTH:
                    self.num_lost += LENGTH - len(response)
            self.num_tokens += len(response)


if __name__ == "__main__":
    main()
