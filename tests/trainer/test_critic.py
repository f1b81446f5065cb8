"""The critic learns, answers when asked, and refuses what it cannot use. test_many_ranks.py has its gradients."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowrl.config import CriticConfig, ReferenceConfig, TrainConfig
from flowrl.trainer.critic import Critic
from flowrl.trainer.dump import dumping
from flowrl.trainer.failure import NonFiniteUpdate
from flowrl.trainer.reference import Reference
from flowrl.trainer.world import World
from tests.trainer.cases import TEMPERATURE, make_returns, make_samples

SAMPLES = make_samples(9)


def make_critic(model_dir: Path, world: World, value_clip: float | None = 0.5) -> Critic:
    train = TrainConfig(warmup_steps=0, micro_batch_tokens=256)
    return Critic(model_dir, world, train, CriticConfig(learning_rate=1e-2, warmup_steps=0, value_clip=value_clip))


def update(critic: Critic, returns: list[np.ndarray], old_values: list[np.ndarray]) -> dict[str, float]:
    critic.begin_update()
    critic.accumulate(SAMPLES, returns, old_values)
    return critic.end_update()


def test_critic_starts_at_zero_and_learns_to_explain_returns(world: World, model_dir: Path) -> None:
    critic = make_critic(model_dir, world, value_clip=None)
    assert all(not value.any() for value in critic.values(SAMPLES))
    returns = [0.5 + np.arange(len(sample.response_tokens), dtype=np.float32) / 10 for sample in SAMPLES]
    metrics = [update(critic, returns, returns) for _ in range(40)]
    assert abs(metrics[0]["critic/vf_explained_var"]) < 1e-5 and metrics[-1]["critic/vf_explained_var"] > 0.5
    assert metrics[-1]["critic/vf_loss"] < 0.3 * metrics[0]["critic/vf_loss"]
    assert critic.step == 40


def test_equal_returns_have_nothing_to_explain(world: World, model_dir: Path) -> None:
    same = [np.full(len(sample.response_tokens), 0.1, np.float32) for sample in SAMPLES]
    assert update(make_critic(model_dir, world), same, same)["critic/vf_explained_var"] == 0


def test_values_may_be_asked_for_within_an_update(world: World, model_dir: Path) -> None:
    critic = make_critic(model_dir, world)
    critic.model.head.weight.detach().to_local().fill_(0.05)
    before = critic.values(SAMPLES)
    critic.begin_update()
    within = critic.values(SAMPLES)
    critic.accumulate(SAMPLES, *make_returns(SAMPLES))
    critic.end_update()
    assert all(np.array_equal(a, b) for a, b in zip(before, within, strict=True))
    assert not np.array_equal(np.concatenate(critic.values(SAMPLES)), np.concatenate(before))


def test_return_that_is_not_finite_steps_nothing_and_its_row_is_dumped(
    world: World, model_dir: Path, tmp_path: Path
) -> None:
    critic = make_critic(model_dir, world)
    before = critic.values(SAMPLES)
    broken, old_values = make_returns(SAMPLES)
    broken[5][0] = np.nan
    with (
        pytest.raises(NonFiniteUpdate, match=r"critic, update 0: loss nan.*step not taken.*rows train/1/1\.0"),
        dumping(tmp_path, update=7, rank=0),
    ):
        update(critic, broken, old_values)
    assert all(np.array_equal(a, b) for a, b in zip(before, critic.values(SAMPLES), strict=True))
    assert critic.step == 0
    dumped = np.load(tmp_path / "not_finite_7_0.npz", allow_pickle=False)
    assert dumped["is_culprit"].tolist() == [place == 5 for place in range(len(SAMPLES))]
    np.testing.assert_array_equal(dumped["per_token_return"], np.concatenate(broken))
    np.testing.assert_array_equal(dumped["per_token_value"], np.concatenate(old_values))


def test_returns_of_another_length_are_refused_by_row(world: World, model_dir: Path) -> None:
    critic = make_critic(model_dir, world)
    returns, old_values = make_returns(SAMPLES)
    with pytest.raises(ValueError, match=r"returns, old_values: row .*group=0, index=1.* has"):
        critic.accumulate(SAMPLES, [returns[0], returns[1][1:], *returns[2:]], old_values)


def test_empty_response_has_no_score(world: World, model_dir: Path) -> None:
    nothing = np.zeros(0, np.int32)
    empty = replace(SAMPLES[0], response_tokens=nothing, response_mask=nothing, rollout_logprobs=nothing)
    scores = Reference(model_dir, world, temperature=TEMPERATURE).logprobs([empty, SAMPLES[1]])
    assert [len(score) for score in scores] == [0, len(SAMPLES[1].response_tokens)]


def test_frozen_reference_may_lie_on_the_host_between_uses(world: World, model_dir: Path) -> None:
    here, away = (
        Reference(model_dir, world, temperature=TEMPERATURE, offload=offload).logprobs(SAMPLES)
        for offload in ("none", "all")
    )
    assert all(np.array_equal(a, b) for a, b in zip(here, away, strict=True))


def test_settings_that_make_no_sense_are_refused_by_name() -> None:
    for name, value in {"learning_rate": 0.0, "warmup_steps": -1, "value_clip": -0.5}.items():
        with pytest.raises(ValueError, match=rf"critic\.{name}"):
            CriticConfig(**{name: value})
    with pytest.raises(ValueError, match=r"reference\.offload: 'sometimes'"):
        ReferenceConfig(offload="sometimes")
    with pytest.raises(ValueError, match=r"train\.offload: 'optimiser'"):
        TrainConfig(offload="optimiser")
