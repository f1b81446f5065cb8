"""Whole runs whose weights go by a directory that all nodes see."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flowrl.report.staleness_check import check_run
from flowrl.weights.store import WeightStore
from tests.integration.runs import ROOT, SMALL, events, run_to_end, sessions, small_run
from tests.integration.test_resume import command, kill_all_after, run_to_its_end

BUFFERS = 2
STEPS = 6
APART = ("pools.train={nodes: [0]}", "pools.rollout={nodes: [1]}", "pools.eval={nodes: [1]}")


def on_disk(directory: Path) -> tuple[str, ...]:
    disk = ("weights.transport=disk", f"weights.dir={directory}/weights", f"weights.buffers={BUFFERS}")
    return (*disk, "eval={every: 4, limit: 50}")


def assert_newest_are_left_alone(root: Path, last: int) -> None:
    assert WeightStore(root, BUFFERS).versions() == [last - 1, last]
    assert list(root.parent.iterdir()) == [root]
    assert {path.name for path in root.iterdir()} <= {f"v{last - 1:08d}", f"v{last:08d}", "pins"}
    assert not list(root.glob("pins/*/*")), "what was evaluated is let go"


def assert_trained_and_clean(directory: Path, run: Path) -> None:
    """The bound was kept, engines followed, versions were evaluated."""
    assert check_run(run).is_clean
    log = events(run)
    assert sum(event["kind"] == "trained" for event in log) == STEPS * 64
    assert max(version for event in log if event["kind"] == "sampled" for version, _ in event["versions"]) >= 3
    summary = json.loads((run / "summary.json").read_text())
    assert summary["max_staleness"] <= 2 and set(summary["accuracy_by_version"]) == {"0", "4", str(STEPS)}
    assert_newest_are_left_alone(directory / "weights" / run.name, STEPS)
    assert not list(sessions(directory).iterdir())


@pytest.mark.timeout(240)
def test_engines_of_one_node_follow_and_the_newest_versions_are_left(tmp_path: Path) -> None:
    arguments = small_run(tmp_path, *on_disk(tmp_path), "pools.train.workers=2", steps=STEPS)
    code, output = run_to_end(arguments, timeout_s=200)
    assert code == 0, output
    assert_trained_and_clean(tmp_path, tmp_path / "runs" / "small")


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.parametrize("pools", [(), APART])
def test_engines_of_two_nodes_follow(pools: tuple[str, ...], tmp_path: Path) -> None:
    """Everything on both; and the trainer on one, engines and evaluation on the other."""
    arguments = [
        sys.executable, "-m", "torch.distributed.run", "--nnodes=1", "--nproc-per-node=2", "--standalone",
        "-m", "flowrl", "run", str(ROOT / "recipes" / "quickstart_two_nodes.yaml"), *SMALL, *on_disk(tmp_path),
        f"train.steps={STEPS}", "run.name=two", f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model",
        f"run.session_dir={sessions(tmp_path)}", *pools,
    ]  # fmt: skip
    code, output = run_to_end(arguments, timeout_s=380)
    assert code == 0, output
    assert_trained_and_clean(tmp_path, tmp_path / "runs" / "two")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_killed_run_publishes_anew_what_its_life_before_has_left(tmp_path: Path) -> None:
    settings = ("data.held_out=50", "run.checkpoint_every=4", "train.steps=16")
    arguments = command(tmp_path, "cut", *on_disk(tmp_path), *settings)
    run = tmp_path / "runs" / "cut"
    kill_all_after(7, arguments, run)
    assert WeightStore(tmp_path / "weights" / "cut", BUFFERS).versions()[-1] > 4
    run_to_its_end([*arguments, "--resume"])
    assert check_run(run).is_clean
    assert_newest_are_left_alone(tmp_path / "weights" / "cut", 16)
