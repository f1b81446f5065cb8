"""The streamed update computes what one plain backward over the whole padded batch computes."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.trainer.update import NonFiniteUpdate
from flowrl.trainer.world import World
from tests.trainer.cases import distance, first_gradient, make_samples, make_trainer, reference, update

SAMPLES = make_samples(24)


@pytest.mark.parametrize("mode", ["token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean"])
def test_loss_and_gradient_equal_those_of_a_padded_batch(mode: str, world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world, aggregate=mode)
    metrics = update(trainer, SAMPLES)
    loss, gradient = reference(model_dir, SAMPLES, mode)
    assert metrics["actor/pg_loss"] == pytest.approx(loss, rel=1e-4)
    assert distance(first_gradient(trainer), gradient) < 1e-5
    norm = math.sqrt(sum(float(np.square(value).sum()) for value in gradient.values()))
    assert metrics["actor/grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_untied_head_gets_its_gradient(world: World, untied_model_dir: Path) -> None:
    trainer = make_trainer(untied_model_dir, world)
    update(trainer, SAMPLES)
    _, gradient = reference(untied_model_dir, SAMPLES, "token-mean")
    assert "lm_head.weight" in gradient
    assert distance(first_gradient(trainer), gradient) < 1e-5


@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_split_into_micro_batches_changes_nothing(budget: int, world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world, budget=budget, aggregate="seq-mean-token-mean")
    update(trainer, SAMPLES[10:], SAMPLES[:3], [], SAMPLES[3:10])
    assert distance(first_gradient(trainer), reference(model_dir, SAMPLES, "seq-mean-token-mean")[1]) < 1e-5


def test_leaving_out_tied_rows_changes_neither_gradient_nor_denominator(world: World, model_dir: Path) -> None:
    results = {}
    for skip in (False, True):
        trainer = make_trainer(model_dir, world, skip_tied=skip)
        results[skip] = update(trainer, SAMPLES), first_gradient(trainer)
    assert results[True][0]["training/num_tokens"] == results[False][0]["training/num_tokens"]
    assert results[True][0]["training/num_forward_tokens"] < results[False][0]["training/num_forward_tokens"]
    assert results[True][0]["actor/pg_loss"] == pytest.approx(results[False][0]["actor/pg_loss"], rel=1e-5)
    assert distance(results[True][1], results[False][1]) < 1e-5


def test_update_of_tied_rows_alone_has_no_gradient(world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world)
    metrics = update(trainer, [replace(sample, advantage=0.0) for sample in SAMPLES])
    assert metrics["actor/grad_norm"] == 0 and metrics["actor/pg_loss"] == 0
    assert all(math.isfinite(value) for value in metrics.values())


def test_clipped_step_moves_along_a_gradient_of_that_norm(world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world, grad_clip=1e-3)
    metrics = update(trainer, SAMPLES)
    norm = math.sqrt(sum(float(np.square(value).sum()) for value in first_gradient(trainer).values()))
    assert metrics["actor/grad_norm"] > 1e-3
    assert norm == pytest.approx(1e-3, rel=1e-3)


def test_metrics_carry_the_names_of_the_field(world: World, model_dir: Path) -> None:
    metrics = update(make_trainer(model_dir, world), SAMPLES)
    names = "pg_loss entropy ppo_kl pg_clipfrac grad_norm lr"
    assert {f"actor/{name}" for name in names.split()} <= set(metrics)
    assert 0 < metrics["actor/entropy"] < math.log(48)
    assert 0 < metrics["training/rollout_probs_diff_mean"] < metrics["training/rollout_probs_diff_max"] < 1


def test_row_that_is_not_finite_stops_the_update_by_name(world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world)
    before = {name: tensor.full_tensor().clone() for name, tensor in trainer.policy.lm.named_parameters()}
    broken = replace(SAMPLES[6], rollout_logprobs=np.full_like(SAMPLES[6].rollout_logprobs, np.nan))
    with pytest.raises(NonFiniteUpdate, match=r"train/1/2\.0") as caught:
        update(trainer, [*SAMPLES[:6], broken, *SAMPLES[7:]])
    assert caught.value.rows == (SAMPLES[6].key,)
    assert trainer.step == 0
    for name, tensor in trainer.policy.lm.named_parameters():
        assert torch.equal(tensor.full_tensor(), before[name])
    assert math.isfinite(update(trainer, SAMPLES)["actor/grad_norm"])


def test_repeated_updates_raise_the_probability_of_rewarded_tokens(world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world, rate=3e-3)
    samples = [replace(sample, advantage=1.0) for sample in make_samples(16, seed=5)]
    losses = [update(trainer, samples)["actor/pg_loss"] for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1


def test_bfloat16_compute_stays_near_float32(world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world, compute_dtype="bfloat16")
    update(trainer, SAMPLES)
    assert all(tensor.dtype == torch.float32 for tensor in trainer.policy.lm.parameters())
    assert distance(first_gradient(trainer), reference(model_dir, SAMPLES, "token-mean")[1]) < 0.2
