"""What an update that is not finite consumed is on disk afterwards, and gradients that stand out are counted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from flowrl.trainer.checkpoint import load, save
from flowrl.trainer.dump import dumping
from flowrl.trainer.failure import NonFiniteUpdate
from flowrl.trainer.spikes import FACTOR, LEAST, GradientSpikes
from flowrl.trainer.world import World
from tests.trainer.cases import make_samples, make_trainer, update

SAMPLES = make_samples(8)


def test_rows_of_an_update_that_is_not_finite_are_dumped_with_the_culprit_marked(
    world: World, model_dir: Path, tmp_path: Path
) -> None:
    broken = replace(SAMPLES[6], rollout_logprobs=np.full_like(SAMPLES[6].rollout_logprobs, np.nan))
    batch = [*SAMPLES[:6], broken, SAMPLES[7]]
    with (
        pytest.raises(NonFiniteUpdate, match=r"train/1/2\.0; this rank's rows are in .*not_finite_5_0\.npz"),
        dumping(tmp_path, update=5, rank=0),
    ):
        update(make_trainer(model_dir, world), batch)
    dumped = np.load(tmp_path / "not_finite_5_0.npz", allow_pickle=False)
    assert dumped["is_culprit"].tolist() == [False] * 6 + [True, False]
    assert list(zip(dumped["partition"], dumped["group"], dumped["index"], strict=True)) == [
        (sample.key.partition, sample.key.group, sample.key.index) for sample in batch
    ]
    for name in ("prompt", "response"):
        tokens = np.split(dumped[f"{name}_tokens"], np.cumsum(dumped[f"{name}_length"])[:-1])
        for found, sample in zip(tokens, batch, strict=True):
            np.testing.assert_array_equal(found, getattr(sample, f"{name}_tokens"))
    np.testing.assert_allclose(dumped["advantage"], [sample.advantage for sample in batch])


def test_finite_update_leaves_no_dump(world: World, model_dir: Path, tmp_path: Path) -> None:
    with dumping(tmp_path, update=0, rank=0):
        update(make_trainer(model_dir, world), SAMPLES)
    assert not list(tmp_path.iterdir())


def test_norm_far_above_the_median_is_a_spike_once_there_is_a_median() -> None:
    spikes = GradientSpikes()
    spikes.add(1000.0)  # nothing to compare it with
    for _ in range(LEAST):
        spikes.add(1.0)
    assert spikes.num == 0
    spikes.add(FACTOR * 0.99)
    assert spikes.num == 0
    spikes.add(FACTOR * 1.01)
    assert spikes.num == 1


def test_norms_that_stay_large_stop_being_spikes_and_zeros_do_not_count() -> None:
    spikes = GradientSpikes()
    for _ in range(LEAST):
        spikes.add(0.0)
    for _ in range(LEAST):
        spikes.add(1.0)
    for _ in range(50):
        spikes.add(100.0)
    assert spikes.num == LEAST


def test_spikes_are_reported_and_survive_a_checkpoint(world: World, model_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model_dir, world, rate=1e-6)
    for _ in range(LEAST):
        assert update(trainer, SAMPLES)["actor/grad_spikes"] == 0
    path = save(tmp_path, trainer, world, extra={}, keep=1)
    resumed = make_trainer(model_dir, world, rate=1e-6)
    load(path, resumed)
    large = [replace(sample, advantage=50 * sample.advantage) for sample in SAMPLES]
    assert update(resumed, large)["actor/grad_spikes"] == 1
