"""Weights off a GPU into shared memory and back into an engine on it, against what its link can do in the same run.

    python benchmarks/weights_gpu.py [--shapes 0.6B 8B] [--rounds 5]

One process, one GPU: float32 masters on it, published as bfloat16 by `Publisher`, loaded in place into a bfloat16 model
beside them. Bound: one copy of 1 GiB between the GPU and pinned memory, each way. `unregistered`: the same publishing
with buffers that CUDA does not know. `first`: seconds of the first publishing to each buffer, which makes its pages and
registers them, in the median.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SHAPES = {  # hidden size, layers, heads, intermediate size, tied embeddings
    "0.6B": (1024, 28, 16, 3072, True),
    "8B": (4096, 36, 32, 12288, False),
}
BUFFERS = 2
GIB = 1 << 30


def main() -> None:
    given = parse()
    if not torch.cuda.is_available():
        raise SystemExit("weights_gpu: torch sees no CUDA device here; nothing measured")
    print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, medians of {given.rounds} rounds\n")
    off, onto = link_speed(given.rounds)
    print(f"bound: {off:.1f} GB/s off the GPU, {onto:.1f} GB/s onto it, pinned\n")
    print("| shape | GB | publish GB/s | of it | unregistered GB/s | of it | load GB/s | of it | first s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in given.shapes:
        print(row(shape, given.rounds, off, onto), flush=True)
        torch.cuda.empty_cache()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def link_speed(rounds: int) -> tuple[float, float]:
    """GB/s from the GPU and to it."""
    host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(GIB, dtype=torch.uint8, device="cuda")
    off = seconds(lambda: host.copy_(device), rounds)
    onto = seconds(lambda: device.copy_(host), rounds)
    return GIB / off / 1e9, GIB / onto / 1e9


def row(shape: str, rounds: int, off: float, onto: float) -> str:
    from flowrl.weights.form import Form
    from flowrl.weights.loading import load_in_place
    from flowrl.weights.publish import Publisher
    from flowrl.weights.store import WeightStore
    from flowrl.weights.tensorfile import Kind

    masters, served = model(shape, torch.float32), model(shape, torch.bfloat16)
    kinds = {name: Kind(tensor.shape, torch.bfloat16) for name, tensor in masters.state_dict().items()}
    free = os.statvfs("/dev/shm").f_bavail * os.statvfs("/dev/shm").f_frsize
    num_bytes = sum(kind.num_bytes for kind in kinds.values())
    if free < (BUFFERS + 1) * num_bytes:
        return f"| {shape} | {num_bytes / 1e9:.1f} | /dev/shm has {free / 1e9:.0f} GB free, too little | | | | | | |"
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flowrl-bench-") as memory:
        root = Path(memory) / "weights"
        form = Form(kinds, ())
        publisher = Publisher(masters, root, WeightStore(root, BUFFERS), "bfloat16", form=form)
        versions = iter(range(10_000))
        first = statistics.median(once(lambda: publisher.publish(next(versions))) for _ in range(BUFFERS + 1))
        publish = seconds(lambda: publisher.publish(next(versions)), rounds)
        newest = WeightStore(root, BUFFERS).latest()
        assert newest is not None
        state = served.state_dict(keep_vars=True)
        load = seconds(lambda: load_in_place(state, newest.path), rounds)
        assert all(torch.equal(state[name], tensor.bfloat16()) for name, tensor in masters.state_dict().items())
        for registered in publisher._writer._registered.values():  # type: ignore[union-attr]
            registered.close()
        unregistered = seconds(lambda: publisher.publish(next(versions)), rounds)
        publisher.close()
    speeds = [publisher.num_bytes / taken / 1e9 for taken in (publish, unregistered, load)]
    cells = [f"{speed:.1f} | {speed / bound:.0%}" for speed, bound in zip(speeds, (off, off, onto), strict=True)]
    return f"| {shape} | {num_bytes / 1e9:.1f} | " + " | ".join(cells) + f" | {first:.2f} |"


def model(shape: str, dtype: torch.dtype) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    hidden, layers, heads, intermediate, is_tied = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=is_tied,
    )
    with torch.device("cuda"):
        return Qwen3ForCausalLM(config).to(dtype)


def seconds(action: Callable[[], object], rounds: int) -> float:
    return statistics.median([once(action) for _ in range(rounds + 1)][1:])


def once(action: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
