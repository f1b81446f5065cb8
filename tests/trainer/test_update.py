"""The streamed update computes what one plain backward over the whole padded batch computes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.config import TrainConfig
from flowrl.config.presets import configured
from flowrl.trainer.failure import NonFiniteUpdate
from flowrl.trainer.minibatches import minibatches
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Sample
from flowrl.trainer.reference import Reference
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from tests.algorithms import slow_float64 as slow
from tests.trainer.cases import TEMPERATURE, distance, first_gradient, make_samples, make_trainer, reference, update
from tests.trainer.ladder import Ladder
from tests.trainer.whole_batches import CONFIGURATIONS, change, make, make_batch, starting_weights, updates

SAMPLES = make_samples(24)
SPREAD = ("rewards", "advantages", "returns", "values")


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
    assert metrics["critic/rewards/mean"] == metrics["critic/rewards/max"] == 0  # these samples have none
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


# Updates that need the whole batch


@pytest.fixture(scope="module")
def start(ladder: Ladder, world: World) -> dict[str, np.ndarray]:
    return starting_weights(ladder.models / "qwen3", world)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", sorted(CONFIGURATIONS))
def test_neither_ranks_nor_micro_batches_change_an_update(
    name: str, start: dict[str, np.ndarray], ladder: Ladder, world: World
) -> None:
    """Two ranks, with whole groups dealt out unevenly, and one that takes the batch in three parts."""
    found, model = ladder.rung(2), ladder.models / "qwen3"
    metrics, parameters = updates(make(name, model, world, budget=40), make_batch()[12:], [], make_batch()[:12])
    for rank in range(2):
        assert change(dict(np.load(found / f"whole-{name}-{rank}.npz")), parameters, start) < 2e-3
        other = json.loads((found / f"whole-{name}-{rank}.json").read_text())
        assert set(other) == set(metrics)
        for key in (
            "actor/pg_loss",
            "actor/grad_norm",
            "training/num_tokens",
            "critic/advantages/mean",
            "actor/kl_coef",
        ):
            if key in metrics:
                assert other[key] == pytest.approx(metrics[key], rel=2e-3, abs=1e-5), key


def trained_on(samples: list[Sample], model_dir: Path, world: World, **algorithm: object) -> dict[str, np.ndarray]:
    """The gradient of one streamed update with the samples' own advantages."""
    config = configured(**algorithm)  # type: ignore[arg-type]
    train = TrainConfig(learning_rate=1e-3, warmup_steps=0, grad_clip=1e9, micro_batch_tokens=64)
    trainer = PolicyTrainer(load_policy(model_dir, world, temperature=TEMPERATURE), world, train, config)
    update(trainer, samples)
    return first_gradient(trainer)


def padded(rows: list[np.ndarray]) -> np.ndarray:
    return np.stack([np.pad(np.asarray(row, np.float64), (0, 20 - len(row))) for row in rows])


def test_whitened_returns_are_those_of_the_whole_batch(world: World, model_dir: Path) -> None:
    samples = make_batch()
    mask = padded([sample.response_mask for sample in samples])
    reward = np.zeros_like(mask)
    for row, sample in enumerate(samples):
        if mask[row].any():
            reward[row, np.flatnonzero(mask[row])[-1]] = sample.reward
    returns, _ = slow.gae(reward, np.zeros_like(mask), mask, 0.9, 1.0)
    white = slow.whiten(returns, mask)
    given = [
        replace(sample, per_token={"advantage": row[: len(sample.response_mask)].astype(np.float32)})
        for sample, row in zip(samples, white, strict=True)
    ]
    trainer = make("whitened", model_dir, world)
    update(trainer, samples[:7], samples[7:])
    expected = trained_on(given, model_dir, world, name="ppo", advantage="grpo")
    assert distance(first_gradient(trainer), expected) < 1e-5


def test_lite_ppo_streams_to_the_batchs_deviation(world: World, model_dir: Path) -> None:
    """Accumulated undivided as it comes, and the same when the batch is awaited."""
    samples = make_batch()
    scores, groups = [sample.reward for sample in samples], [sample.key.group for sample in samples]
    divided = slow.lite_ppo(scores, groups)
    mean_of = {group: np.mean([s for s, g in zip(scores, groups, strict=True) if g == group]) for group in set(groups)}
    centred = [replace(sample, advantage=sample.reward - mean_of[sample.key.group]) for sample in samples]
    given = [replace(sample, advantage=float(a)) for sample, a in zip(samples, divided, strict=True)]
    expected = trained_on(given, model_dir, world, name="grpo", clip_high=0.2, dual_clip=None)
    trainer = make("scaled", model_dir, world)
    update(trainer, centred[:9], centred[9:])
    assert distance(first_gradient(trainer), expected) < 1e-5


def test_epochs_deal_out_every_group_whole_and_in_a_new_order(world: World) -> None:
    samples = make_batch()
    dealt = minibatches(samples, 4, 3, seed=(0, 5))
    assert len(dealt) == 12
    for epoch in range(3):
        parts = dealt[4 * epoch : 4 * epoch + 4]
        assert sorted(place for part in parts for place in part) == list(range(len(samples)))
        groups = [{samples[place].key.group for place in part} for part in parts]
        assert sum(map(len, groups)) == 6
    assert dealt[:4] != dealt[4:8]
    assert dealt == minibatches(samples, 4, 3, seed=(0, 5)) != minibatches(samples, 4, 3, seed=(0, 6))


def test_old_log_probs_stay_those_of_before_the_update(world: World, model_dir: Path) -> None:
    """The clip is felt only from the second step on, and the version counts updates, not steps."""
    train = TrainConfig(learning_rate=3e-2, warmup_steps=0, grad_clip=1e9, micro_batch_tokens=64, epochs=3)
    policy = load_policy(model_dir, world, temperature=TEMPERATURE)
    trainer = PolicyTrainer(policy, world, train, configured("decoupled_ppo"))
    metrics = update(trainer, make_batch())
    assert metrics["training/steps"] == 3 and trainer.step == 1
    assert metrics["actor/pg_clipfrac"] > 0.05
    policy = load_policy(model_dir, world, temperature=TEMPERATURE)
    once = PolicyTrainer(policy, world, replace(train, epochs=1), configured("decoupled_ppo"))
    assert update(once, make_batch())["actor/pg_clipfrac"] == 0


def test_an_update_stops_where_the_policy_has_gone_too_far(world: World, model_dir: Path) -> None:
    train = TrainConfig(learning_rate=3e-2, warmup_steps=0, grad_clip=1e9, epochs=8, stop_kl=1e-3)
    policy = load_policy(model_dir, world, temperature=TEMPERATURE)
    trainer = PolicyTrainer(policy, world, train, configured("grpo", old="recomputed"))
    assert 2 <= update(trainer, make_batch())["training/steps"] < 8


def test_a_critic_learns_what_the_returns_are(world: World, model_dir: Path) -> None:
    trainer = make("critic", model_dir, world, rate=1e-6)
    metrics = [update(trainer, make_batch()) for _ in range(6)]
    assert metrics[-1]["critic/vf_loss"] < 0.5 * metrics[0]["critic/vf_loss"]
    assert {f"critic/{name}/{part}" for name in SPREAD for part in ("mean", "max", "min")} <= set(metrics[0])
    assert metrics[0]["critic/values/max"] == 0 and metrics[-1]["critic/values/max"] > metrics[-1]["critic/values/min"]
    rewards = [sample.reward for sample in make_batch()]
    assert metrics[0]["critic/rewards/max"] == pytest.approx(max(rewards), rel=1e-6)
    # At lambda 0.9 a return is a sum of what is left of the one reward: no larger, and as large on the last token.
    assert metrics[0]["critic/returns/max"] <= metrics[0]["critic/rewards/max"] + 1e-6
    assert trainer.critic is not None and trainer.critic.step == trainer.step == 6


@pytest.mark.parametrize("name", ["kl_in_reward", "kl_in_loss"])
def test_an_adaptive_coefficient_seeks_its_target(name: str, world: World, model_dir: Path) -> None:
    """The policy is its own reference at first: a KL of zero lowers the coefficient."""
    reference = Reference(model_dir, world, temperature=TEMPERATURE)
    own = [
        replace(s, rollout_logprobs=row) for s, row in zip(make_batch(), reference.logprobs(make_batch()), strict=True)
    ]
    trainer = make(name, model_dir, world, rate=1e-9)
    coefficients = [update(trainer, own)["actor/kl_coef"] for _ in range(2)]
    assert coefficients[0] == 0.1
    assert coefficients[1] == pytest.approx(0.1 * (1 - 0.2 * 23 / 10_000))
