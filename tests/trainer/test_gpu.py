"""What only a GPU shows: the kernel for rows of many lengths, and shards that wait on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowrl.trainer.world import World, join
from tests.trainer.cases import distance, first_gradient, make_samples, make_trainer, reference, update

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]
SAMPLES = make_samples(24)


@pytest.fixture(scope="module")
def gpu_world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    meeting = tmp_path_factory.mktemp("world") / "file"
    with join(rank=0, world_size=1, file=meeting, device="cuda:0", timeout_s=60) as joined:
        yield joined


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 0.05)])
def test_gradient_on_a_gpu_is_that_of_a_padded_batch(
    dtype: str, most: float, gpu_world: World, model_dir: Path
) -> None:
    trainer = make_trainer(model_dir, gpu_world, compute_dtype=dtype)
    update(trainer, SAMPLES)
    expected = reference(model_dir, SAMPLES, "token-mean")[1]
    assert distance(first_gradient(trainer), expected) < most


def test_offloaded_shards_give_the_same_gradient_and_lie_on_the_host(gpu_world: World, model_dir: Path) -> None:
    gradients = {}
    for offload in ("none", "all"):
        trainer = make_trainer(model_dir, gpu_world, compute_dtype="bfloat16", offload=offload)
        update(trainer, SAMPLES)
        gradients[offload] = first_gradient(trainer)
        places = {parameter.to_local().device.type for parameter in trainer.policy.parameters()}
        assert places == {"cpu" if offload == "all" else "cuda"}
    assert distance(gradients["all"], gradients["none"]) < 1e-5
