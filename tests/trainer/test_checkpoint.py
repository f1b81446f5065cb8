"""A trainer continues from its checkpoint as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl.config import CriticConfig, TrainConfig
from flowrl.trainer.checkpoint import CheckpointWriter, latest, load, save, saved_steps
from flowrl.trainer.critic import Critic
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from tests.trainer.cases import make_samples, make_trainer, update


def weights(trainer: PolicyTrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.full_tensor().detach().clone() for name, tensor in trainer.policy.lm.named_parameters()}


def test_resumed_trainer_continues_bit_for_bit(world: World, model_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model_dir, world)
    for step in range(3):
        update(trainer, make_samples(8, seed=step))
    path = save(tmp_path, trainer, world, extra={"cursor": 24}, keep=2)
    metrics = update(trainer, make_samples(8, seed=9))
    resumed = make_trainer(model_dir, world)
    assert load(path, resumed) == {"cursor": 24}
    assert resumed.step == 3
    assert update(resumed, make_samples(8, seed=9)) == metrics
    expected = weights(trainer)
    for name, tensor in weights(resumed).items():
        assert torch.equal(tensor, expected[name]), name


def test_only_the_newest_checkpoints_stay(world: World, model_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model_dir, world)
    assert latest(tmp_path / "none") is None
    for step in range(4):
        trainer.step = step
        save(tmp_path, trainer, world, extra={}, keep=2)
    assert saved_steps(tmp_path) == [2, 3]
    assert latest(tmp_path) == tmp_path / "step_3"


def test_checkpoint_half_written_is_not_there(world: World, model_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model_dir, world)
    (tmp_path / ".new-step_0").mkdir()
    (tmp_path / ".new-step_0" / "rest_of_a_crash").touch()
    assert latest(tmp_path) is None
    path = save(tmp_path, trainer, world, extra={}, keep=1)
    assert latest(tmp_path) == path and not (path / "rest_of_a_crash").exists()


def test_saving_what_json_cannot_hold_is_an_error(world: World, model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path, make_trainer(model_dir, world), world, extra={"queue": object()}, keep=1)
    assert latest(tmp_path) is None


def test_checkpoint_written_in_the_background_is_of_the_moment_it_was_asked_for(
    world: World, model_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(model_dir, world)
    update(trainer, make_samples(8))
    expected, moments = weights(trainer), trainer.optimizer.state_dict()
    expected_moments = {name: moment.clone() for name, moment in moments.items()}
    writer = CheckpointWriter(tmp_path, world, keep=2)
    assert writer.finished() is None and writer.wait() is None
    writer.save(trainer, extra={"cursor": 1})
    update(trainer, make_samples(8, seed=1))
    assert writer.wait() == tmp_path / "step_1" == latest(tmp_path)
    assert writer.finished() is None
    resumed = make_trainer(model_dir, world)
    assert load(tmp_path / "step_1", resumed) == {"cursor": 1}
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(resumed).items())
    for name, moment in resumed.optimizer.state_dict().items():
        assert torch.equal(moment, expected_moments[name]), name


def test_background_checkpoints_follow_each_other_and_the_newest_stay(
    world: World, model_dir: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(model_dir, world)
    writer = CheckpointWriter(tmp_path, world, keep=2)
    for step in range(4):
        trainer.step = step
        writer.save(trainer, extra={})
    writer.wait()
    assert saved_steps(tmp_path) == [2, 3]
    assert not list(tmp_path.glob(".new-*"))


def test_background_checkpoint_that_cannot_be_written_is_an_error_of_the_next_wait(
    world: World, model_dir: Path, tmp_path: Path
) -> None:
    (tmp_path / "step_0").touch()  # a file where the directory should go
    writer = CheckpointWriter(tmp_path, world, keep=1)
    writer.save(make_trainer(model_dir, world), extra={})
    with pytest.raises(NotADirectoryError):
        writer.wait()


def test_critic_continues_with_its_policy(world: World, model_dir: Path, tmp_path: Path) -> None:
    train, samples = TrainConfig(warmup_steps=0, micro_batch_tokens=64), make_samples(8)
    returns = [sample.rollout_logprobs for sample in samples]

    def train_critic(critic: Critic) -> dict[str, float]:
        critic.begin_update()
        critic.accumulate(samples, returns, returns)
        return critic.end_update()

    trainers = []
    for _ in range(2):
        trainers.append(make_trainer(model_dir, world))
        trainers[-1].critic = Critic(model_dir, world, train, CriticConfig(learning_rate=1e-2, warmup_steps=2))
    trainer, resumed = trainers
    assert trainer.critic is not None and resumed.critic is not None
    train_critic(trainer.critic)
    path = save(tmp_path, trainer, world, extra={}, keep=1)
    load(path, resumed)
    assert resumed.critic.step == 1
    assert train_critic(resumed.critic) == train_critic(trainer.critic)
