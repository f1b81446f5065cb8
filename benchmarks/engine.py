"""Tokens a second of the rollout engines on one model, beside Hugging Face `generate`.

    python benchmarks/engine.py [--sglang-python .venv-sglang/bin/python] [--concurrency 1 8 32 128] [--out RESULT.json]
    python benchmarks/engine.py --gpu     # Qwen3-0.6B's shape, bfloat16

A Qwen3 of about 10 million random weights answers prompts of 16 to 64 tokens; the lengths of the responses are drawn
from a log-normal distribution (σ = 1.2, median 64, at most 1,024) and forced on every side, sampled at temperature 1.
An engine holds `concurrency` requests at once and takes the next when one ends. `generate` has no such thing: it pads
a batch of `concurrency` requests and runs as long as the longest of it; rows that have ended are computed on, and only
tokens that were asked for count. Every side gets the same requests, two threads of torch, and a first pass of short
responses that is not timed; sides take turns, and the median of `--rounds` counts.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, StoppingCriteria, StoppingCriteriaList

from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import Engine, GenerateRequest, SamplingParams
from flowrl.rollout.sglang.engine import SGLangEngine

THREADS = 2
LONGEST = 1024
CONTEXT = 1152
MEDIAN = 64
SIGMA = 1.2
WARM_TOKENS = 32


@dataclass(frozen=True)
class Setting:
    """What is served, and where. `shape`: of a Qwen3."""

    device: str
    dtype: str
    shape: dict[str, Any]


SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
QWEN3_600M = {
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
CPU = Setting("cpu", "float32", SMALL)
GPU = Setting("cuda", "bfloat16", QWEN3_600M)
Side = Callable[[list[GenerateRequest], int], Any]


def main() -> None:
    given = parse()
    if given.gpu and not torch.cuda.is_available():
        raise SystemExit("engine: torch sees no CUDA device here; nothing measured")
    setting = GPU if given.gpu else CPU
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        model = AutoModelForCausalLM.from_config(qwen3(setting), dtype=getattr(torch, setting.dtype))
        model.save_pretrained(folder)
        rows = asyncio.run(measure(Path(folder), setting, given))
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "device": torch.cuda.get_device_name(0) if given.gpu else "cpu",
        "dtype": setting.dtype,
        "commit": commit(),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": THREADS,
        "rounds": given.rounds,
        "load_average": os.getloadavg()[0],
        "tokens_per_s": rows,
    }
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sglang-python", type=Path, help="interpreter of the environment that has SGLang")
    parser.add_argument("--gpu", action="store_true", help="Qwen3-0.6B's shape in bfloat16 on the first GPU")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--batches", type=int, default=4, help="requests, in multiples of the concurrency")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-generate", action="store_true", help="leave Hugging Face generate out")
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


async def measure(folder: Path, setting: Setting, given: argparse.Namespace) -> list[dict[str, Any]]:
    async with AsyncExitStack() as opened:
        sides: dict[str, Side] = {"embedded": await engine_side(opened, embedded_engine(setting), folder)}
        if given.sglang_python is not None:
            sides["sglang"] = await engine_side(opened, sglang_engine(given.sglang_python, setting, folder), folder)
        if not given.no_generate:
            sides["generate"] = generate_side(folder, setting)
        rows = []
        for concurrency in given.concurrency:
            count = given.batches * concurrency if concurrency > 1 else 8
            requests = make_requests(count, setting.shape["vocab_size"])
            rows.append({"concurrency": concurrency, **await compare(sides, requests, concurrency, given.rounds)})
            print(rows[-1], flush=True)
        return rows


def make_requests(count: int, vocabulary: int) -> list[GenerateRequest]:
    rng = np.random.default_rng(0)
    lengths = np.clip(np.exp(rng.normal(np.log(MEDIAN), SIGMA, size=count)), 1, LONGEST).astype(int)
    return [
        GenerateRequest(
            request_id=f"r{index}",
            tokens=tuple(rng.integers(vocabulary, size=rng.integers(16, 65)).tolist()),
            sampling=SamplingParams(max_tokens=int(length), seed=index),
        )
        for index, length in enumerate(lengths)
    ]


def short(requests: list[GenerateRequest]) -> list[GenerateRequest]:
    sampling = [replace(one.sampling, max_tokens=min(one.sampling.max_tokens, WARM_TOKENS)) for one in requests]
    return [replace(one, sampling=params) for one, params in zip(requests, sampling, strict=True)]


async def compare(
    sides: dict[str, Side], requests: list[GenerateRequest], concurrency: int, rounds: int
) -> dict[str, Any]:
    """Median tokens a second of each side, and ratios to the embedded engine's."""
    tokens = sum(request.sampling.max_tokens for request in requests)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            asked = requests if turn else short(requests[: 2 * concurrency])
            begun = time.perf_counter()
            await side(asked, concurrency)
            if turn:
                speeds[name].append(tokens / (time.perf_counter() - begun))
    found = {name: round(statistics.median(values), 1) for name, values in speeds.items()}
    ratios = {
        f"embedded_over_{name}": round(found["embedded"] / found[name], 2) for name in found if name != "embedded"
    }
    return {"requests": len(requests), "tokens": tokens, **found, **ratios}


def qwen3(setting: Setting) -> Qwen3Config:
    return Qwen3Config(
        **setting.shape,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )


def embedded_engine(setting: Setting) -> EmbeddedEngine:
    return EmbeddedEngine(
        device=setting.device, dtype=setting.dtype, max_batch=128, max_model_tokens=CONTEXT, threads=THREADS
    )


def sglang_engine(python: Path, setting: Setting, folder: Path) -> SGLangEngine:
    return SGLangEngine(
        python=str(python),
        device=setting.device,
        server_args={"max_running_requests": 128, "max_total_tokens": 128 * CONTEXT, "context_length": CONTEXT + 8},
        env={"OMP_NUM_THREADS": str(THREADS), "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"},
        log_path=folder / "server.log",
    )


async def engine_side(opened: AsyncExitStack, engine: Engine, folder: Path) -> Side:
    await engine.start(folder, 0)
    opened.push_async_callback(engine.close)

    async def run(requests: list[GenerateRequest], concurrency: int) -> None:
        places = asyncio.Semaphore(concurrency)

        async def one(request: GenerateRequest) -> None:
            async with places:
                made = await engine.generate(request)
            assert len(made.tokens) == request.sampling.max_tokens, "the length was not forced"

        await asyncio.gather(*(one(request) for request in requests))

    return run


def generate_side(folder: Path, setting: Setting) -> Side:
    dtype = getattr(torch, setting.dtype)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(setting.device).eval()

    async def run(requests: list[GenerateRequest], concurrency: int) -> None:
        for start in range(0, len(requests), concurrency):
            generate_batch(model, requests[start : start + concurrency])

    return run


class ForcedLengths(StoppingCriteria):
    """A row is done when it has its own length."""

    def __init__(self, prompt: int, lengths: list[int], device: torch.device) -> None:
        self._ends = prompt + torch.tensor(lengths, device=device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **options: Any) -> torch.Tensor:
        return input_ids.shape[1] >= self._ends


@torch.inference_mode()
def generate_batch(model: PreTrainedModel, requests: list[GenerateRequest]) -> None:
    width = max(len(request.tokens) for request in requests)
    ids = torch.zeros(len(requests), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.tokens) :] = torch.tensor(request.tokens)
        mask[row, width - len(request.tokens) :] = 1
    lengths = [request.sampling.max_tokens for request in requests]
    made = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        top_k=0,
        pad_token_id=0,
        max_new_tokens=max(lengths),
        stopping_criteria=StoppingCriteriaList([ForcedLengths(width, lengths, model.device)]),
    )
    assert made.shape[1] == width + max(lengths), "generate ended early"


def commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


if __name__ == "__main__":
    main()
