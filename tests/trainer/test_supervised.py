"""The warm start learns, for real: a tiny model imitates demonstrations."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from flowrl.config import TrainConfig
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Demonstration
from flowrl.trainer.supervised import SupervisedTrainer
from flowrl.trainer.world import World


def demonstrations() -> list[Demonstration]:
    """The response repeats the prompt backwards."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(2, 48, draw.integers(1, 5)).astype(np.int32) for _ in range(24)]
    return [Demonstration(prompt, np.append(prompt[::-1], 1).astype(np.int32)) for prompt in prompts]


def test_supervised_steps_lower_the_loss_to_near_zero(world: World, model_dir: Path) -> None:
    trainer = SupervisedTrainer(load_policy(model_dir, world), world, TrainConfig(micro_batch_tokens=64), 1e-2)
    losses = [trainer.step(demonstrations())["sft/loss"] for _ in range(60)]
    assert losses[0] > 3.0
    assert losses[-1] < 0.3


def test_loss_is_the_token_mean_over_all_responses(world: World, model_dir: Path) -> None:
    batch = demonstrations()
    trainer = SupervisedTrainer(load_policy(model_dir, world), world, TrainConfig(micro_batch_tokens=20), 1e-3)
    metrics = trainer.step(batch)
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    negative, count = 0.0, 0
    for item in batch:
        tokens = torch.from_numpy(np.concatenate([item.prompt_tokens, item.response_tokens])).long()[None]
        labels = tokens.clone()
        labels[0, : len(item.prompt_tokens)] = -100
        with torch.no_grad():
            negative += lm(tokens, labels=labels).loss.item() * len(item.response_tokens)
        count += len(item.response_tokens)
    assert metrics["sft/num_tokens"] == count
    assert metrics["sft/loss"] == pytest.approx(negative / count, rel=1e-5)


def test_loss_that_is_not_finite_steps_nothing(world: World, model_dir: Path) -> None:
    policy = load_policy(model_dir, world)
    with torch.no_grad():
        policy.lm.base_model.norm.weight.to_local().fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="warm start: loss nan"):
        SupervisedTrainer(policy, world, TrainConfig(), 1e-3).step(demonstrations())
