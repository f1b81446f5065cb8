"""The warm start learns, for real: a tiny model imitates demonstrations."""

from __future__ import annotations

from dataclasses import replace
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
    trainer = SupervisedTrainer(load_policy(model_dir, world), world, TrainConfig(micro_batch_tokens=256), 1e-2)
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


def test_loss_that_is_not_finite_steps_nothing_and_its_rows_are_named(world: World, untied_model_dir: Path) -> None:
    policy = load_policy(untied_model_dir, world)
    batch = [replace(item, prompt_tokens=np.minimum(item.prompt_tokens, 40)) for item in demonstrations()[:5]]
    batch[3] = replace(batch[3], prompt_tokens=np.array([47], np.int32))
    with torch.no_grad():
        policy.lm.get_input_embeddings().weight.to_local()[47] = float("nan")
    before = policy.lm.lm_head.weight.full_tensor().clone()
    trainer = SupervisedTrainer(policy, world, TrainConfig(micro_batch_tokens=10), 1e-3)
    with pytest.raises(FloatingPointError, match=r"warm start: loss nan.*not finite in \[3\] of this rank's 5 rows"):
        trainer.step(batch)
    assert torch.equal(policy.lm.lm_head.weight.full_tensor(), before)
