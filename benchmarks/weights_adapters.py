"""What adapters alone save on the way to an embedded engine: bytes and seconds, beside merged weights.

    python benchmarks/weights_adapters.py [--size 100] [--rank 16] [--rounds 5]

One process: a model in the shape of Qwen3 with random weights, bfloat16 on disk and in the engine, float32 in the
trainer, adapters on all linear modules. `publish`: what the trainer spends (the merging included where it merges).
`load`: what the engine spends between two decode steps, merging W + B·A included where it does. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from weights import make_model

from flowrl.config import LoRAConfig
from flowrl.trainer.lora import AdapterModel, MergedModel, adapter_config, add_adapters
from flowrl.weights.form import Form
from flowrl.weights.loading import load_in_place
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=100, help="millions of parameters, as in weights.py")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flowrl-bench-") as memory:
        model_dir = Path(memory) / "model"
        make_model(model_dir, given.size)
        lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        add_adapters(lm, LoRAConfig(rank=given.rank, alpha=2.0 * given.rank))
        served = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.bfloat16).state_dict(keep_vars=True)
        adapters, merged = AdapterModel(lm), MergedModel(lm)
        form = Form.of_adapters(adapters.state_dict(), adapter_config(lm, model_dir), model_dir)
        ways = {
            "merged": (Publisher(merged, model_dir, WeightStore(Path(memory) / "m", 2), "bfloat16"), merged.refresh),
            "adapters": (
                Publisher(adapters, model_dir, WeightStore(Path(memory) / "a", 2), "float32", form=form),
                lambda: None,
            ),
        }
        print("| published | MB | publish ms | load ms |\n|---|---|---|---|")
        states = []
        for name, (publisher, refresh) in ways.items():
            print(f"| {name} | {publisher.num_bytes / 1e6:.2f} | {measure(publisher, refresh, served, given.rounds)} |")
            states.append({key: tensor.detach().clone() for key, tensor in served.items()})
            publisher.close()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0]), "the two ways differ"


def measure(
    publisher: Publisher, refresh: Callable[[], None], served: dict[str, torch.Tensor], rounds: int
) -> str:  # two cells
    publishing, loading = [], []
    for version in range(rounds + 2):
        started = time.perf_counter()
        refresh()
        path = publisher.publish(version)
        published = time.perf_counter()
        assert path is not None
        load_in_place(served, path)
        publishing.append(1e3 * (published - started))
        loading.append(1e3 * (time.perf_counter() - published))
        time.sleep(0.05)
    return f"{statistics.median(publishing[2:]):.1f} | {statistics.median(loading[2:]):.1f}"


if __name__ == "__main__":
    main()
