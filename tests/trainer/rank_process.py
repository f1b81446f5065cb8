"""One rank of a real world of two: `python -m tests.trainer.rank_process RANK PORT MODEL_DIR OUT_DIR`.

Runs the cases below, one after the other in one world, and leaves what each found in OUT_DIR for the test to judge.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from flowrl.config import TrainConfig
from flowrl.trainer.checkpoint import save
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Demonstration
from flowrl.trainer.supervised import SupervisedTrainer
from flowrl.trainer.update import NonFiniteUpdate
from flowrl.trainer.world import World, join
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore
from tests.trainer.cases import first_gradient, make_samples, make_trainer, update

NUM_ROWS = 24

# Rows of rank 0 and rank 1. At a budget of one row a micro-batch, `uneven` is 5 of them against 2.
SPLITS = {
    "even": (range(12), range(12, 24)),
    "uneven": ([0, 2, 4, 6, 8], [10, 12]),
    "empty": (range(24), []),
}


def gradient_cases(rank: int, world: World, model_dir: Path, out: Path) -> None:
    samples = make_samples(NUM_ROWS)
    for name, split in SPLITS.items():
        trainer = make_trainer(model_dir, world, budget=1 if name == "uneven" else 64)
        mine = [samples[index] for index in split[rank]]
        metrics = update(trainer, mine) if mine else update(trainer)
        gradient = first_gradient(trainer)
        (out / f"{name}-{rank}.json").write_text(json.dumps(metrics))
        np.savez(out / f"{name}-{rank}.npz", **gradient)


def failure_case(rank: int, world: World, model_dir: Path, out: Path) -> None:
    """A row of rank 1 is broken; both ranks must stop, and go on together afterwards."""
    trainer = make_trainer(model_dir, world)
    mine = make_samples(8, seed=rank)
    broken = replace(mine[0], rollout_logprobs=np.full_like(mine[0].rollout_logprobs, np.nan), advantage=1.0)
    try:
        update(trainer, [broken, *mine[1:]] if rank else mine)
        rows = None
    except NonFiniteUpdate as error:
        rows = [[key.group, key.index] for key in error.rows]
    after = update(trainer, mine)["actor/grad_norm"]
    (out / f"failure-{rank}.json").write_text(json.dumps({"rows": rows, "after": after}))


def continuation_case(rank: int, world: World, model_dir: Path, out: Path) -> None:
    """Saved after two updates, published after the third: one rank must continue to the same weights."""
    trainer = make_trainer(model_dir, world)
    for step in range(2):
        update(trainer, make_samples(8, seed=10 + step)[rank::2])
    save(out / "checkpoints", trainer, world, extra={"cursor": 7 + rank}, keep=1)
    update(trainer, make_samples(8, seed=12)[rank::2])
    store = WeightStore(out / "published", 2) if rank == 0 else None
    publisher = Publisher(trainer.policy.lm, model_dir, store, "float32")
    publisher.publish(3)
    publisher.export(out / "exported", writes=rank == 0)
    save_file(publisher.full_state(), out / f"state-{rank}.safetensors")


def supervised_case(rank: int, world: World, model_dir: Path, out: Path) -> None:
    policy = load_policy(model_dir, world)
    supervised = SupervisedTrainer(policy, world, TrainConfig(micro_batch_tokens=64), learning_rate=1e-2)
    mine = [] if rank else [Demonstration(np.array([1, 2], np.int32), np.array([3, 4, 5], np.int32))]
    losses = [supervised.step(mine)["sft/loss"] for _ in range(5)]
    (out / f"supervised-{rank}.json").write_text(json.dumps(losses))


def main(rank: int, port: int, model_dir: Path, out: Path) -> None:
    torch.set_num_threads(1)
    with join(host="127.0.0.1", port=port, rank=rank, world_size=2, interface="lo", timeout_s=60) as world:
        for case in (gradient_cases, failure_case, continuation_case, supervised_case):
            case(rank, world, model_dir, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
