"""A trainer continues from its checkpoint as if it had never stopped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl.trainer.checkpoint import latest, load, save, saved_steps
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
