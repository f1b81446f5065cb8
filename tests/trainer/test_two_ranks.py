"""What two real ranks do together beside computing a gradient: stop, publish, leave a checkpoint, warm up."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.trainer.checkpoint import latest, load
from flowrl.trainer.world import World
from tests.trainer.cases import make_samples, make_trainer, update
from tests.trainer.ladder import Ladder

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def found(ladder: Ladder) -> Path:
    """What the two ranks left behind."""
    return ladder.rung(2)


def test_row_that_is_not_finite_stops_both_ranks(found: Path) -> None:
    failures = [json.loads((found / f"failure-{rank}.json").read_text()) for rank in range(2)]
    assert [failure["rows"] for failure in failures] == [[], [[0, 0]]]
    assert failures[0]["after"] == failures[1]["after"] > 0


def test_one_rank_continues_the_checkpoint_of_two(found: Path, ladder: Ladder, world: World) -> None:
    trainer = make_trainer(ladder.models / "qwen3", world)
    path = latest(found / "saved")
    assert path is not None and load(path, trainer) == {"cursor": 7}
    update(trainer, make_samples(8, seed=12))
    published = load_file(found / "published" / "v00000003" / "model.safetensors")
    for name, tensor in trainer.policy.lm.named_parameters():
        torch.testing.assert_close(published[name], tensor.full_tensor().detach(), rtol=1e-4, atol=1e-6)


def test_gathered_weights_are_the_same_wherever_they_go(found: Path) -> None:
    published = load_file(found / "published" / "v00000003" / "model.safetensors")
    for path in ("exported/model.safetensors", "state-0.safetensors", "state-1.safetensors"):
        other = load_file(found / path)
        assert set(other) == set(published)
        assert all(torch.equal(other[name], published[name]) for name in published), path


def test_supervised_step_with_an_empty_rank_lowers_the_loss_on_both(found: Path) -> None:
    losses = [json.loads((found / f"supervised-{rank}.json").read_text()) for rank in range(2)]
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0] - 0.5
