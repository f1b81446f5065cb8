"""Updates that need their whole batch, for one rank and for several: what each configuration must compute, by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.config import CriticConfig, TrainConfig
from flowrl.config.presets import configured
from flowrl.trainer.critic import Critic
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Sample
from flowrl.trainer.reference import Reference
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from tests.trainer.cases import TEMPERATURE, make_samples

NUM_ROWS = 24
LONGEST = 20

# Each has its own path through the update. `train`: settings of TrainConfig beside.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "whitened": {"name": "reinforce_plus_plus", "advantage_settings": {"gamma": 0.9}},
    "whitened_samples": {"name": "reinforce_plus_plus_baseline", "overlong_buffer": 12},
    "scaled": {"name": "lite_ppo"},
    "scaled_with_entropy": {"name": "lite_ppo", "entropy_coef": 0.01},
    "decoupled": {"name": "decoupled_ppo", "m2po": 0.02, "train": {"minibatches": 2, "epochs": 2}},
    "critic": {"name": "ppo", "advantage_settings": {"lam": 0.9}, "train": {"minibatches": 2}},
    "kl_in_reward": {"name": "grpo", "kl": {"coef": 0.1, "estimator": "k1", "place": "reward", "target": 0.1}},
    "greedy_baseline": {"name": "remax", "kl": {"coef": 0.1, "estimator": "k1", "place": "reward"}},
    "several_scores": {"name": "gdpo", "advantage_settings": {"weights": {"score": 1.0, "acc": 0.5}}},
    "kl_in_loss": {"name": "grpo", "kl": {"coef": 0.1, "place": "loss", "target": 0.05}},
}


def make_batch(seed: int = 0) -> list[Sample]:
    """`make_samples` with rewards, two of six groups tied, and a row whose tokens are all masked; with a second score a
    row, and a greedy score a group."""
    draw = np.random.default_rng(seed + 50)
    samples = make_samples(NUM_ROWS, seed, longest=LONGEST)
    rewards = [float(sample.key.group) if sample.key.group % 3 == 0 else draw.normal() for sample in samples]
    return [
        replace(sample, reward=reward, per_row=row_numbers(sample, reward))
        for sample, reward in zip(samples, rewards, strict=True)
    ]


def row_numbers(sample: Sample, reward: float) -> dict[str, np.ndarray]:
    greedy = [0.25 * sample.key.group] if sample.key.index == 1 else []
    return {
        "scores": np.array([reward, sample.key.index % 3], np.float32),
        "baseline": np.array(greedy, np.float32),
    }


def make(name: str, model_dir: Path, world: World, *, budget: int = 64, rate: float = 1e-3) -> PolicyTrainer:
    given = dict(CONFIGURATIONS[name])
    more = given.pop("train", {})
    train = TrainConfig(learning_rate=rate, warmup_steps=0, grad_clip=1e9, micro_batch_tokens=budget, **more)
    algorithm = configured(**given)
    critic = None
    if algorithm.has_critic:
        critic = Critic(model_dir, world, train, CriticConfig(learning_rate=1e-2, warmup_steps=0))
    reference = None
    if algorithm.kl is not None:
        reference = Reference(model_dir, world, temperature=TEMPERATURE, micro_batch_tokens=budget)
    policy = load_policy(model_dir, world, temperature=TEMPERATURE)
    return PolicyTrainer(
        policy, world, train, algorithm, max_response_tokens=LONGEST, critic=critic, reference=reference
    )


def updates(trainer: PolicyTrainer, *shares: list[Sample]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Two updates, of the shares and of other batches cut the same way; what the second measured, the parameters."""
    metrics: dict[str, float] = {}
    for seed in (0, 1):
        trainer.begin_update()
        places = {sample.key: place for place, sample in enumerate(make_batch(0))}
        for share in shares:
            batch = make_batch(seed)
            trainer.accumulate([batch[places[sample.key]] for sample in share])
        metrics = trainer.end_update()
    parameters = dict(trainer.policy.lm.named_parameters())
    return metrics, {name: tensor.full_tensor().detach().numpy() for name, tensor in parameters.items()}  # type: ignore[attr-defined]


def dealt(samples: list[Sample], rank: int) -> list[Sample]:
    """Whole groups: those of rank 0 are fewer."""
    return [sample for sample in samples if (sample.key.group in (0, 4)) == (rank == 0)]


def change(found: dict[str, np.ndarray], other: dict[str, np.ndarray], start: dict[str, np.ndarray]) -> float:
    """How far two trainings went apart, as a part of how far they went."""
    apart = sum(float(np.square(found[name] - other[name]).sum()) for name in found)
    went = sum(float(np.square(found[name] - start[name]).sum()) for name in found)
    return float(np.sqrt(apart / went))


def starting_weights(model_dir: Path, world: World) -> dict[str, np.ndarray]:
    policy = load_policy(model_dir, world, temperature=TEMPERATURE)
    return {name: tensor.full_tensor().detach().numpy() for name, tensor in policy.lm.named_parameters()}  # type: ignore[attr-defined]
