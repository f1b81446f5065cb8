"""What a rank of a rung does: the cases below, in one world. Each leaves what it found in `out`, for tests to judge."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from flowrl.config import CriticConfig, LoRAConfig, TrainConfig
from flowrl.trainer.checkpoint import CheckpointWriter, latest, load
from flowrl.trainer.critic import Critic
from flowrl.trainer.packing import Sample
from flowrl.trainer.reference import Reference
from flowrl.trainer.world import World
from tests.trainer.architectures import ARCHITECTURES
from tests.trainer.cases import TEMPERATURE, first_gradient, make_returns, make_samples, make_trainer, update
from tests.trainer.ranks import joined

NUM_ROWS = 13
LORA = LoRAConfig(rank=4, alpha=8.0)
# Settings that must change no gradient.
VARIANTS = {"recompute": {"activation_checkpointing": True}, "offload": {"offload": "all"}}


def share(world: World) -> slice:
    """Uneven: all rows but one on rank 0, that one on the last rank, none between them."""
    if world.size == 1:
        return slice(None)
    if world.rank == 0:
        return slice(0, NUM_ROWS - 1)
    return slice(NUM_ROWS - 1 if world.rank == world.size - 1 else NUM_ROWS, None)


def one_by_one(samples: list[Sample]) -> list[list[Sample]]:
    return [[sample] for sample in samples]


def architecture_cases(world: World, out: Path, models: Path) -> None:
    """Streamed row by row, unevenly."""
    for name in ARCHITECTURES:
        trainer = make_trainer(models / name, world, budget=40)
        metrics = update(trainer, *one_by_one(make_samples(NUM_ROWS)[share(world)]))
        (out / f"{name}-{world.rank}.json").write_text(json.dumps(metrics))
        np.savez(out / f"{name}-{world.rank}.npz", **first_gradient(trainer))


def variant_cases(world: World, out: Path, models: Path) -> None:
    for name, settings in VARIANTS.items():
        trainer = make_trainer(models / "qwen3", world, **settings)
        update(trainer, make_samples(NUM_ROWS)[share(world)])
        np.savez(out / f"{name}-{world.rank}.npz", **first_gradient(trainer))


def lora_case(world: World, out: Path, models: Path) -> None:
    for name in ("qwen3", "gpt2", "qwen3_moe"):
        trainer = make_trainer(models / name, world, lora=LORA, rate=1e-2)
        for seed in range(3):
            update(trainer, make_samples(NUM_ROWS, seed=seed)[share(world)])
        state = {
            key: tensor.full_tensor().detach().clone() for key, tensor in trainer.policy.published.state_dict().items()
        }
        save_file({key: state[key] for key in state}, out / f"merged-{name}-{world.rank}.safetensors")


def reference_case(world: World, out: Path, models: Path) -> None:
    reference = Reference(models / "qwen3", world, temperature=TEMPERATURE, micro_batch_tokens=64)
    mine = make_samples(NUM_ROWS)[share(world)]
    together = reference.logprobs(mine)
    with reference.opened():
        alone = [reference.logprobs([sample])[0] for sample in mine]
    again = reference.logprobs(mine[:1])
    for name, scores in {"together": together, "alone": alone, "again": again}.items():
        np.savez(out / f"{name}-{world.rank}.npz", *scores)


def critic_case(world: World, out: Path, models: Path) -> None:
    train = TrainConfig(warmup_steps=0, grad_clip=1e9, micro_batch_tokens=64)
    critic = Critic(models / "qwen3", world, train, CriticConfig(learning_rate=1e-3, warmup_steps=0))
    critic.model.head.weight.detach().to_local().fill_(0.05)
    samples, part = make_samples(NUM_ROWS), share(world)
    returns, old_values = make_returns(samples)
    np.savez(out / f"values-{world.rank}.npz", *critic.values(samples[part]))
    critic.begin_update()
    for place in range(len(samples))[part]:
        critic.accumulate(samples[place : place + 1], returns[place : place + 1], old_values[place : place + 1])
    metrics = critic.end_update()
    (out / f"critic-{world.rank}.json").write_text(json.dumps(metrics))
    np.savez(out / f"critic-{world.rank}.npz", **first_gradient(critic))


def checkpoint_case(world: World, out: Path, models: Path, previous: Path | None) -> None:
    """Continues the rung before, and saves in the background while the next update already changes the parameters."""
    trainer = make_trainer(models / "qwen3", world)
    if previous is not None:
        path = latest(previous / "checkpoints")
        assert path is not None
        load(path, trainer)
    update(trainer, make_samples(NUM_ROWS, seed=100 + trainer.step)[share(world)])
    writer = CheckpointWriter(out / "checkpoints", world, keep=1)
    writer.save(trainer, extra={"rung": world.size})
    update(trainer, make_samples(NUM_ROWS, seed=7)[share(world)])
    writer.wait()


def run_rung(rank: int, world_size: int, out: Path, models: Path, previous: Path | None) -> None:
    """previous: `out` of the rung before, whose checkpoint this one continues."""
    torch.manual_seed(0)
    with joined(rank, world_size, out) as world:
        for case in (architecture_cases, variant_cases, lora_case, reference_case, critic_case):
            case(world, out, models)
        checkpoint_case(world, out, models, previous)
