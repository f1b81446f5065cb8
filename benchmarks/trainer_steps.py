"""Contestants of the trainer's benchmark, a process each: `-m benchmarks.trainer_steps NAME FOLDER THREADS …`.

flowrl   an update of `PolicyTrainer`: packed, log-probs in chunks
plain    a loop over transformers and torch: right-padded micro-batches, each to its own longest row, whole logits
chunked, naive   peak memory of log-probs and their gradient, by FlowRL and by log_softmax over whole logits
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from benchmarks.trainer_batch import CLIP_HIGH, CLIP_LOW, GRAD_CLIP, LEARNING_RATE, Batch, load_batch
from flowrl.config import AlgorithmConfig, TrainConfig
from flowrl.trainer.logprob import token_logprobs
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Sample
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import join
from transfer_queue.rows import RowKey


def timed_steps(step: Callable[[], float], num_steps: int) -> dict[str, object]:
    """One step to warm up, whose loss is that of the model as it came; then `num_steps` timed ones."""
    loss = step()
    seconds, cpu_seconds = [], []
    for _ in range(num_steps):
        started, cpu_started = time.perf_counter(), time.process_time()
        step()
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    return {"loss": loss, "seconds": seconds, "cpu_seconds": cpu_seconds}


def flowrl(folder: Path, num_steps: int, budget: int) -> dict[str, object]:
    batch = load_batch(folder / "batch.npz")
    samples = [
        Sample(
            key=RowKey("train", place, 0),
            prompt_tokens=batch.prompts[place].astype(np.int32),
            response_tokens=batch.responses[place].astype(np.int32),
            response_mask=np.ones(len(batch.responses[place]), np.uint8),
            rollout_logprobs=batch.old[place],
            advantage=float(batch.advantages[place]),
        )
        for place in range(len(batch.prompts))
    ]
    train = TrainConfig(
        learning_rate=LEARNING_RATE, warmup_steps=0, grad_clip=GRAD_CLIP, micro_batch_tokens=budget, beta2=0.999
    )
    algorithm = AlgorithmConfig(clip_low=CLIP_LOW, clip_high=CLIP_HIGH, dual_clip=None)
    with join(rank=0, world_size=1, file=folder / "flowrl-world") as world:
        trainer = PolicyTrainer(load_policy(folder / "model", world), world, train, algorithm)

        def step() -> float:
            trainer.begin_update()
            trainer.accumulate(samples)
            return trainer.end_update()["actor/pg_loss"]

        return timed_steps(step, num_steps)


def plain(folder: Path, num_steps: int, micro_rows: int) -> dict[str, object]:
    batch = load_batch(folder / "batch.npz")
    lm = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa").eval()
    adam = torch.optim.AdamW(lm.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.999), weight_decay=0.0, fused=True)
    num_tokens = sum(map(len, batch.responses))
    parts = [
        range(start, min(start + micro_rows, len(batch.prompts))) for start in range(0, len(batch.prompts), micro_rows)
    ]

    def step() -> float:
        total = 0.0
        for part in parts:
            loss = plain_loss(lm, batch, part) / num_tokens
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), GRAD_CLIP)
        adam.step()
        adam.zero_grad()
        return total

    return timed_steps(step, num_steps)


def plain_loss(lm: torch.nn.Module, batch: Batch, part: range) -> torch.Tensor:
    rows = [torch.from_numpy(np.concatenate([batch.prompts[row], batch.responses[row]])) for row in part]
    token_BL = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    seen_BL, mask_BL, old_BL = (torch.zeros(token_BL.shape) for _ in range(3))
    for place, row in enumerate(part):
        start, end = len(batch.prompts[row]), len(rows[place])
        seen_BL[place, :end] = 1
        mask_BL[place, start:end] = 1
        old_BL[place, start:end] = torch.from_numpy(batch.old[row])
    logit_BLV = lm(token_BL, attention_mask=seen_BL.long(), use_cache=False).logits
    logprob_BL = logit_BLV[:, :-1].log_softmax(-1).gather(-1, token_BL[:, 1:, None])[..., 0]
    advantage_B1 = torch.from_numpy(batch.advantages[part.start : part.stop])[:, None]
    ratio_BL = (logprob_BL - old_BL[:, 1:]).exp()
    loss_BL = torch.maximum(-advantage_B1 * ratio_BL, -advantage_B1 * ratio_BL.clamp(1 - CLIP_LOW, 1 + CLIP_HIGH))
    return (loss_BL * mask_BL[:, 1:]).sum()


def peak_memory(compute: Callable[..., torch.Tensor], tokens: int, hidden: int, vocabulary: int) -> dict[str, object]:
    """Bytes by which the process grew at most, beyond its inputs: forward, backward, gradients included."""
    torch.manual_seed(0)
    hidden_RH = torch.randn(tokens, hidden).requires_grad_()
    weight_VH = (torch.randn(vocabulary, hidden) / hidden**0.5).requires_grad_()
    target_R = torch.randint(0, vocabulary, (tokens,))
    compute(hidden_RH[:1], weight_VH[:8], target_R[:1] % 8).sum().backward()
    hidden_RH.grad = weight_VH.grad = None
    before = memory_kb("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    started = time.perf_counter()
    compute(hidden_RH, weight_VH, target_R).sum().backward()
    seconds = time.perf_counter() - started
    assert weight_VH.grad is not None
    norm = float(weight_VH.grad.norm())
    return {"bytes": 1024 * (memory_kb("VmHWM") - before), "seconds": seconds, "grad_norm": norm}


def memory_kb(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0])


def naive_logprobs(hidden_RH: torch.Tensor, weight_VH: torch.Tensor, target_R: torch.Tensor) -> torch.Tensor:
    return (hidden_RH @ weight_VH.T).log_softmax(-1).gather(-1, target_R[:, None])[:, 0]


def main(name: str, folder: str, threads: str, *numbers: str) -> None:
    torch.set_num_threads(int(threads))
    given = list(map(int, numbers))
    if name in ("flowrl", "plain"):
        result = {"flowrl": flowrl, "plain": plain}[name](Path(folder), *given)
    elif name == "chunked":
        result = peak_memory(lambda *inputs: token_logprobs(*inputs)[0], *given)
    else:
        result = peak_memory(naive_logprobs, *given)
    print(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
