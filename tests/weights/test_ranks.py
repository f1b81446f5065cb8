"""Ranks in processes of their own write one version together, and fail together."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowrl.weights.store import WeightStore
from tests.weights.rank_process import NUM_VERSIONS, Model

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.timeout(300)


def start(case: str, size: int, model_dir: Path, out: Path, **environment: str) -> list[subprocess.Popen[str]]:
    given: Mapping[str, str] = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", **environment,
    }  # fmt: skip
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.weights.rank_process", case, str(rank), str(size), str(model_dir), str(out)],
            cwd=ROOT, env=given, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def run(case: str, size: int, model_dir: Path, out: Path) -> list[int]:
    """Exit codes; whatever fails without being meant to says so."""
    processes = start(case, size, model_dir, out)
    try:
        errors = [process.communicate(timeout=280)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    codes = [process.returncode for process in processes]
    assert set(codes) <= {0, 9}, "\n".join(errors)
    return codes


@pytest.fixture(scope="module")
def ranks_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the ranks load: tied weights once."""
    path = tmp_path_factory.mktemp("ranks-model")
    torch.manual_seed(0)
    state = {name: torch.randn(tensor.shape) for name, tensor in Model().state_dict().items() if name != "head.weight"}
    save_file(state, path / "model.safetensors")
    return path


def test_ranks_write_what_a_gather_would(ranks_dir: Path, tmp_path: Path) -> None:
    """Three ranks: uneven chunks, and tensors of which some ranks have nothing. In shared memory and on disk."""
    run("equal", 3, ranks_dir, tmp_path)
    for way in ("True", "False"):
        store = WeightStore(tmp_path / way / "weights", 2)
        assert store.versions() == [NUM_VERSIONS - 2, NUM_VERSIONS - 1]
        published = load_file(store.path(NUM_VERSIONS - 1) / "model.safetensors")
        gathered = load_file(tmp_path / way / "gathered.safetensors")
        assert published.keys() == gathered.keys() == load_file(ranks_dir / "model.safetensors").keys()
        assert all(torch.equal(published[name], tensor) for name, tensor in gathered.items())


def test_rank_that_cannot_write_leaves_the_old_version_in_force(ranks_dir: Path, tmp_path: Path) -> None:
    run("failure", 2, ranks_dir, tmp_path)
    assert (tmp_path / "error-1").read_text() == "the memory of this rank is broken"
    assert (tmp_path / "error-0").read_text() == "version 1: ranks [1] could not; see their logs"
    assert (tmp_path / "after-0").read_text() == "[]"
    assert WeightStore(tmp_path / "weights", 2).versions() == [0, 2]


def test_what_went_wrong_in_the_background_is_told_by_whatever_comes_next(ranks_dir: Path, tmp_path: Path) -> None:
    run("told", 2, ranks_dir, tmp_path)
    reasons = ("version 1: ranks [1] could not; see their logs", "the memory of this rank is broken")
    for rank, reason in enumerate(reasons):
        assert (tmp_path / f"error-{rank}").read_text() == f"{reason} | {reason}"
    assert WeightStore(tmp_path / "weights", 2).versions() == [0, 2]


def test_rank_trains_on_before_the_others_have_written(ranks_dir: Path, tmp_path: Path) -> None:
    """The version is then not yet there, and has none of what came after."""
    run("ahead", 2, ranks_dir, tmp_path)
    assert (tmp_path / "seen").read_text() == "[0]"
    store = WeightStore(tmp_path / "weights", 2)
    assert store.versions() == [0, 1]
    first, second = (load_file(store.path(version) / "model.safetensors") for version in (0, 1))
    assert all(torch.equal(first[name], tensor) for name, tensor in second.items())


def test_rank_of_another_node_that_cannot_write_is_named_to_all(ranks_dir: Path, tmp_path: Path) -> None:
    run("nodes", 4, ranks_dir, tmp_path)
    reasons = 3 * ["version 1: ranks [3] could not; see their logs"] + ["the memory of this rank is broken"]
    assert [(tmp_path / f"error-{rank}").read_text() for rank in range(4)] == reasons
    assert (tmp_path / "after-0").read_text() == "[]", "neither node shows it"
    for node in (0, 2):
        assert WeightStore(tmp_path / f"weights-{node}", 2).versions() == [0, 2]


@pytest.mark.parametrize("case", ["killed", "killed_late"])
def test_rank_that_dies_leaves_the_old_version_in_force(case: str, ranks_dir: Path, tmp_path: Path) -> None:
    codes = run(case, 2, ranks_dir, tmp_path)
    assert codes[1] == 9
    assert (tmp_path / "error-0").read_text() == "version 1: ranks [1] could not; see their logs"
    assert WeightStore(tmp_path / "weights", 2).versions() == [0]


def test_rank_of_another_node_that_dies_is_an_error_of_all(ranks_dir: Path, tmp_path: Path) -> None:
    assert run("nodes_killed", 4, ranks_dir, tmp_path)[2] == 9
    assert sorted(path.name for path in tmp_path.glob("error-*")) == ["error-0", "error-1", "error-3"]
    for node in (0, 2):
        assert WeightStore(tmp_path / f"weights-{node}", 2).versions() == [0]


def test_ranks_with_other_plans_are_refused_before_anything_is_written(ranks_dir: Path, tmp_path: Path) -> None:
    run("differing", 2, ranks_dir, tmp_path)
    for rank in range(2):
        assert "ranks [1] plan to write other bytes than rank 0" in (tmp_path / f"error-{rank}").read_text()
    assert not (tmp_path / "weights").exists()
