"""The part of the trainer's benchmark that needs a GPU: a Qwen3-0.6B-shaped model, bfloat16, packs of several sizes."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from flowrl.config import AlgorithmConfig, TrainConfig
from flowrl.trainer.flops import peak_flops
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Sample
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import join
from transfer_queue.rows import RowKey

PACKS = ((4096, False), (4096, True), (16_384, False), (32_768, False))  # tokens, whether activations are recomputed
STEP_TOKENS = 65_536
PROMPT_TOKENS, RESPONSE_TOKENS = 128, 896
STEPS = 5


def qwen3_600m() -> Qwen3Config:
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=1024,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=3072,
        max_position_embeddings=40_960,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
    )


def make_samples(config: Qwen3Config, rows: int) -> list[Sample]:
    draw = np.random.default_rng(0)
    return [
        Sample(
            key=RowKey("train", row, 0),
            prompt_tokens=draw.integers(0, config.vocab_size, PROMPT_TOKENS).astype(np.int32),
            response_tokens=draw.integers(0, config.vocab_size, RESPONSE_TOKENS).astype(np.int32),
            response_mask=np.ones(RESPONSE_TOKENS, np.uint8),
            rollout_logprobs=np.full(RESPONSE_TOKENS, -np.log(config.vocab_size), np.float32),
            advantage=float(draw.normal()),
        )
        for row in range(rows)
    ]


def measure(
    model: Path, meeting: Path, samples: list[Sample], pack_tokens: int, *, recompute: bool
) -> tuple[list[float], int, float]:
    """(seconds of each timed step, bytes at the peak, floating-point operations of the model)."""
    train = TrainConfig(
        learning_rate=1e-6, warmup_steps=0, micro_batch_tokens=pack_tokens, compute_dtype="bfloat16",
        activation_checkpointing=recompute,
    )  # fmt: skip
    with join(rank=0, world_size=1, file=meeting, device="cuda:0") as world:
        policy = load_policy(model, world, compute_dtype="bfloat16", activation_checkpointing=recompute)
        trainer = PolicyTrainer(policy, world, train, AlgorithmConfig())
        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(STEPS + 2):
            torch.cuda.synchronize()
            started = time.perf_counter()
            trainer.begin_update()
            trainer.accumulate(samples)
            metrics = trainer.end_update()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds[2:], torch.cuda.max_memory_allocated(), metrics["training/num_flops"]


def report_gpu() -> list[str]:
    if not torch.cuda.is_available():
        raise SystemExit("--gpu: torch sees no CUDA device here; nothing measured")
    config, name = qwen3_600m(), torch.cuda.get_device_name(0)
    samples = make_samples(config, STEP_TOKENS // (PROMPT_TOKENS + RESPONSE_TOKENS - 1))
    num_tokens = len(samples) * (PROMPT_TOKENS + RESPONSE_TOKENS)
    peak = peak_flops(torch.device("cuda"))
    lines = [
        f"{name}, torch {torch.__version__}: Qwen3-0.6B-shaped, random weights, bfloat16 compute, float32 masters, "
        f"{len(samples)} rows of {PROMPT_TOKENS} + {RESPONSE_TOKENS} tokens a step, "
        f"median of {STEPS} steps. "
        + (
            f"MFU against {peak / 1e12:.0f} TFLOP/s dense." if peak else "MFU: the peak of this card is not known here."
        ),
        "",
        "| tokens a pack | activations | step | tokens/s | model TFLOP/s | MFU | peak memory |",
        "|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        Qwen3ForCausalLM(config).save_pretrained(Path(folder) / "model")
        for pack_tokens, recompute in PACKS:
            meeting = Path(folder) / f"world-{pack_tokens}-{recompute}"
            seconds, memory, flops = measure(Path(folder) / "model", meeting, samples, pack_tokens, recompute=recompute)
            step = statistics.median(seconds)
            use = f"{flops / step / peak:.1%}" if peak else "—"
            lines.append(
                f"| {pack_tokens:,} | {'recomputed' if recompute else 'kept'} | {step:.3f} s | "
                f"{num_tokens / step:,.0f} | "
                f"{flops / step / 1e12:.0f} | {use} | {memory / 1e9:.1f} GB |"
            )
    return lines


if __name__ == "__main__":
    print(json.dumps({"lines": report_gpu()}))
