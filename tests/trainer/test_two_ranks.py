"""Two real ranks over gloo compute what one does, however the rows are dealt out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowrl.trainer.checkpoint import latest, load
from flowrl.trainer.world import World
from tests.trainer.cases import distance, make_samples, make_trainer, reference, update
from tests.trainer.conftest import free_port
from tests.trainer.rank_process import NUM_ROWS, SPLITS

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two ranks left behind."""
    out = tmp_path_factory.mktemp("ranks")
    port = free_port()
    arguments = [str(port), str(model_dir), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.trainer.rank_process", str(rank), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank in ranks:
            output, _ = rank.communicate(timeout=90)
            assert rank.returncode == 0, output
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    return out


@pytest.mark.parametrize("name", sorted(SPLITS))
def test_two_ranks_sum_to_the_gradient_of_the_whole_batch(name: str, found: Path, model_dir: Path) -> None:
    samples = make_samples(NUM_ROWS)
    trained = [samples[index] for split in SPLITS[name] for index in split]
    loss, gradient = reference(model_dir, trained, "token-mean")
    for rank in range(2):
        metrics = json.loads((found / f"{name}-{rank}.json").read_text())
        assert metrics["actor/pg_loss"] == pytest.approx(loss, rel=1e-4)
        assert distance(dict(np.load(found / f"{name}-{rank}.npz")), gradient) < 1e-5


def test_row_that_is_not_finite_stops_both_ranks(found: Path) -> None:
    failures = [json.loads((found / f"failure-{rank}.json").read_text()) for rank in range(2)]
    assert [failure["rows"] for failure in failures] == [[], [[0, 0]]]
    assert failures[0]["after"] == failures[1]["after"] > 0


def test_one_rank_continues_the_checkpoint_of_two(found: Path, world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world)
    path = latest(found / "checkpoints")
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
