"""What a rank of a rung does: the cases below, in one world. Each leaves what it found in `out`, for tests to judge.

Some are of two ranks alone: what they show does not depend on how many there are.
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from flowrl.config import CriticConfig, LoRAConfig, TrainConfig
from flowrl.trainer.checkpoint import CheckpointWriter, latest, load, save
from flowrl.trainer.critic import Critic
from flowrl.trainer.failure import NonFiniteUpdate
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Demonstration, Sample
from flowrl.trainer.reference import Reference
from flowrl.trainer.share import balanced_share, whole_batch
from flowrl.trainer.supervised import SupervisedTrainer
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore
from tests.trainer import whole_batches
from tests.trainer.architectures import ARCHITECTURES
from tests.trainer.cases import TEMPERATURE, first_gradient, make_returns, make_samples, make_trainer, update
from tests.trainer.loss_matrix import found_gradients
from tests.trainer.ranks import joined
from transfer_queue.rows import Column, RowKey, Rows

NUM_ROWS = 13
MATRIX_ROWS = 9
LORA = LoRAConfig(rank=4, alpha=8.0)
# With adapters; on four ranks the first alone.
ADAPTED = ("qwen3", "gpt2", "qwen3_moe")
# Settings that must change no gradient.
VARIANTS = {"recompute": {"activation_checkpointing": True}, "offload": {"offload": "all"}}


def share(world: World, num_rows: int = NUM_ROWS) -> slice:
    """Uneven: all rows but one on rank 0, that one on the last rank, none between them."""
    if world.size == 1:
        return slice(None)
    if world.rank == 0:
        return slice(0, num_rows - 1)
    return slice(num_rows - 1 if world.rank == world.size - 1 else num_rows, None)


def one_by_one(samples: list[Sample]) -> list[list[Sample]]:
    return [[sample] for sample in samples]


def architecture_cases(world: World, out: Path, models: Path) -> None:
    """Streamed row by row, unevenly."""
    for name in ARCHITECTURES:
        trainer = make_trainer(models / name, world, budget=40)
        metrics = update(trainer, *one_by_one(make_samples(NUM_ROWS)[share(world)]))
        (out / f"{name}-{world.rank}.json").write_text(json.dumps(metrics))
        np.savez(out / f"{name}-{world.rank}.npz", **first_gradient(trainer))


def matrix_case(world: World, out: Path, models: Path) -> None:
    """Losses in a line each, gradients end to end."""
    losses, gradients = {}, {}
    for key, loss, gradient in found_gradients(models, world, make_samples(MATRIX_ROWS)[share(world, MATRIX_ROWS)]):
        losses[key] = loss
        gradients[key] = np.concatenate([gradient[name].reshape(-1) for name in sorted(gradient)])
    (out / f"matrix-{world.rank}.json").write_text(json.dumps(losses))
    np.savez(out / f"matrix-{world.rank}.npz", **gradients)


def variant_cases(world: World, out: Path, models: Path) -> None:
    for name, settings in VARIANTS.items():
        trainer = make_trainer(models / "qwen3", world, **settings)
        update(trainer, make_samples(NUM_ROWS)[share(world)])
        np.savez(out / f"{name}-{world.rank}.npz", **first_gradient(trainer))


def lora_case(world: World, out: Path, models: Path) -> None:
    for name in ADAPTED[: None if world.size < 4 else 1]:
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
    trainer = make_trainer_with_critic(models / "qwen3", world)
    if previous is not None:
        path = latest(previous / "checkpoints")
        assert path is not None
        load(path, trainer)
    update_both(trainer, make_samples(NUM_ROWS, seed=100 + trainer.step), share(world))
    writer = CheckpointWriter(out / "checkpoints", world, keep=1)
    writer.save(trainer, extra={"rung": world.size})
    update_both(trainer, make_samples(NUM_ROWS, seed=7), share(world))
    writer.wait()


def make_trainer_with_critic(model: Path, world: World) -> PolicyTrainer:
    trainer = make_trainer(model, world)
    train = TrainConfig(warmup_steps=0, grad_clip=1e9, micro_batch_tokens=64)
    trainer.critic = Critic(model, world, train, CriticConfig(learning_rate=1e-3, warmup_steps=0))
    return trainer


def update_both(trainer: PolicyTrainer, samples: list[Sample], part: slice) -> None:
    """Policy and critic, with this rank's part of the samples."""
    assert trainer.critic is not None
    update(trainer, samples[part])
    returns, old_values = make_returns(samples)
    trainer.critic.begin_update()
    trainer.critic.accumulate(samples[part], returns[part], old_values[part])
    trainer.critic.end_update()


def whole_batch_cases(world: World, out: Path, models: Path) -> None:
    """Whole groups, unevenly dealt."""
    mine = whole_batches.dealt(whole_batches.make_batch(), world.rank)
    for name in whole_batches.CONFIGURATIONS:
        trainer = whole_batches.make(name, models / "qwen3", world)
        shares = [mine[:4], mine[4:]] if world.rank else [mine]
        metrics, parameters = whole_batches.updates(trainer, *shares)
        (out / f"whole-{name}-{world.rank}.json").write_text(json.dumps(metrics))
        np.savez(out / f"whole-{name}-{world.rank}.npz", **parameters)


def failure_case(world: World, out: Path, models: Path) -> None:
    """A row of rank 1 is broken; both ranks must stop, and go on together afterwards."""
    trainer = make_trainer(models / "qwen3", world)
    mine = make_samples(8, seed=world.rank)
    broken = replace(mine[0], rollout_logprobs=np.full_like(mine[0].rollout_logprobs, np.nan), advantage=1.0)
    try:
        update(trainer, [broken, *mine[1:]] if world.rank else mine)
        rows = None
    except NonFiniteUpdate as error:
        rows = [[key.group, key.index] for key in error.rows]
    after = update(trainer, mine)["actor/grad_norm"]
    (out / f"failure-{world.rank}.json").write_text(json.dumps({"rows": rows, "after": after}))


def publication_case(world: World, out: Path, models: Path) -> None:
    """Saved after two updates, published after the third: one rank must continue to the same weights."""
    model, rank = models / "qwen3", world.rank
    trainer = make_trainer(model, world)
    for step in range(2):
        update(trainer, make_samples(8, seed=10 + step)[rank::2])
    save(out / "saved", trainer, world, extra={"cursor": 7 + rank}, keep=1)
    update(trainer, make_samples(8, seed=12)[rank::2])
    store = WeightStore(out / "published", 2) if rank == 0 else None
    with closing(Publisher(trainer.policy.lm, model, store, "float32")) as publisher:
        publisher.publish(3)
        publisher.export(out / "exported", writes=rank == 0)
        save_file(publisher.full_state(), out / f"state-{rank}.safetensors")


def supervised_case(world: World, out: Path, models: Path) -> None:
    policy = load_policy(models / "qwen3", world)
    supervised = SupervisedTrainer(policy, world, TrainConfig(micro_batch_tokens=64), learning_rate=1e-2)
    mine = [] if world.rank else [Demonstration(np.array([1, 2], np.int32), np.array([3, 4, 5], np.int32))]
    losses = [supervised.step(mine)["sft/loss"] for _ in range(5)]
    (out / f"supervised-{world.rank}.json").write_text(json.dumps(losses))


def share_case(world: World, out: Path, models: Path) -> None:
    """Ranks have taken 30 groups in two ways: mostly rank 0, or evenly. Keys and tokens of what each ends up with."""
    found = {}
    for name, taker in {"mostly one": lambda group: group % 7 == 0, "evenly": lambda group: group % 2}.items():
        mine = [group for group in range(30) if int(taker(group)) % world.size == world.rank]
        rows = balanced_share(whole_batch([group_rows(group) for group in mine], world), world)
        tokens = len(rows["response_tokens"].values) + len(rows["prompt_tokens"].values)
        found[name] = {"keys": [[key.group, key.index] for key in rows.keys], "tokens": tokens}
    (out / f"share-{world.rank}.json").write_text(json.dumps(found))


def group_rows(group: int) -> Rows:
    """Three rows, in no order."""
    lengths = np.random.default_rng(group).integers(1, 200, 3)
    columns = {
        "prompt_tokens": Column.ragged([np.full(2, group) for _ in lengths], "int32"),
        "response_tokens": Column.ragged([np.full(length, group) for length in lengths], "int32"),
    }
    return Rows([RowKey("train", group, index) for index in (2, 0, 1)], columns)


EVERYWHERE = (architecture_cases, matrix_case, variant_cases, lora_case, reference_case, critic_case, share_case)
OF_TWO = (whole_batch_cases, failure_case, publication_case, supervised_case)


def run_rung(rank: int, world_size: int, out: Path, models: Path, previous: Path | None) -> None:
    """previous: `out` of the rung before, whose checkpoint this one continues."""
    torch.manual_seed(0)
    with joined(rank, world_size, out) as world:
        for case in EVERYWHERE + (OF_TWO if world_size == 2 else ()):
            case(world, out, models)
        checkpoint_case(world, out, models, previous)
