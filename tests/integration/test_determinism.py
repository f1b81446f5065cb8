"""`run.determinism: strict`: the same weights bit for bit, and those of a plain loop that knows no queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.runs import ROOT, events, run_to_end, sessions

pytestmark = pytest.mark.timeout(600)

STEPS = 5
TINY = (
    "data.size=600", "data.held_out=0", "data.dev=0", "eval=null", "warm_start=null", "reward.name=null",
    f"reward.path={ROOT}/tests/integration/dense_reward.py:compute_score",
    "train.batch_groups=8", "rollout.group_size=4", f"train.steps={STEPS}", "train.learning_rate=3e-3",
    "train.warmup_steps=0",
)  # fmt: skip
STRICT = ("run.determinism=strict", "staleness.max=0")


def tiny_run(directory: Path, name: str, *overrides: str, nodes: int = 1, recipe: str = "quickstart") -> Path:
    """Runs to the end; the run's directory."""
    launcher = ["-m", "flowrl"]
    if nodes > 1:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={nodes}", "--standalone", "-m", "flowrl"]
    arguments = [
        sys.executable, *launcher, "run", str(ROOT / f"recipes/{recipe}.yaml"), *TINY,
        f"run.name={name}", f"run.dir={directory}/runs", f"model.path={directory}/model",
        f"run.session_dir={sessions(directory)}", *overrides,
    ]  # fmt: skip
    code, output = run_to_end(arguments, timeout_s=250)
    assert code == 0, output
    return directory / "runs" / name


def weights(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "model.safetensors")


def assert_same_bits(one: Path, other: Path) -> None:
    ours, theirs = weights(one), weights(other)
    assert set(ours) == set(theirs)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert different == []


def metrics_by_step(run: Path) -> dict[int, dict[str, float]]:
    """The trainer's, without what measures time."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    for line in (run / "metrics.jsonl").read_text().splitlines():
        report = json.loads(line)
        if report["worker"] == "train.0.0" and report["step"] is not None:
            found[report["step"]] |= {
                name: value
                for name, value in report.items()
                if name not in ("t", "step", "node", "worker") and not name.startswith(("timing_s/", "perf/"))
            }
    return found


@pytest.fixture(scope="module")
def strict_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("strict"), "first", *STRICT)


def test_two_runs_give_the_same_weights_and_metrics_bit_for_bit(strict_run: Path) -> None:
    again = tiny_run(strict_run.parents[1], "second", *STRICT)
    assert_same_bits(strict_run / "model", again / "model")
    assert metrics_by_step(strict_run) == metrics_by_step(again)
    before = weights(strict_run.parents[1] / "model")
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights(again / "model").items())


def test_a_plain_loop_gives_the_same_weights_and_metrics_bit_for_bit(strict_run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    arguments = [sys.executable, "-m", "tests.integration.plain_loop", str(strict_run / "recipe.yaml"), str(tmp_path)]
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert_same_bits(strict_run / "model", tmp_path)
    plain = json.loads((tmp_path / "metrics.json").read_text())
    ours = metrics_by_step(strict_run)
    assert len(plain) == STEPS
    for step, expected in enumerate(plain, 1):
        assert ours[step] == expected


@pytest.mark.slow
def test_two_nodes_repeat_themselves_with_several_engines_each(tmp_path: Path) -> None:
    overrides = (*STRICT, "pools.rollout.workers=2", "train.steps=3")
    first = tiny_run(tmp_path, "first", *overrides, nodes=2)
    second = tiny_run(tmp_path, "second", *overrides, nodes=2)
    assert_same_bits(first / "model", second / "model")
    assert metrics_by_step(first) == metrics_by_step(second)


@pytest.mark.slow
def test_whole_batches_at_bound_one_are_one_step_off(tmp_path: Path) -> None:
    """Each update but the first trains what the version before its own has sampled, and nothing else."""
    run = tiny_run(tmp_path, "one_off", "rollout.handover=batch", "staleness.max=1")
    log = events(run)
    sampled = {tuple(event["key"]): event["versions"] for event in log if event["kind"] == "sampled"}
    versions = defaultdict(set)
    for event in log:
        if event["kind"] == "trained":
            versions[event["update"]] |= {version for version, _ in sampled[tuple(event["key"])]}
    assert versions == {update: {max(0, update - 1)} for update in range(STEPS)}


def test_taking_turns_at_one_device_changes_no_bit(strict_run: Path, tmp_path: Path) -> None:
    pools = "pools={rollout: {devices: [cpu:0]}, train: {devices: [cpu:0]}}"
    one_device = tiny_run(tmp_path, "colocated", *STRICT, pools)
    assert_same_bits(strict_run / "model", one_device / "model")
    assert metrics_by_step(strict_run) == metrics_by_step(one_device)
