"""A whole run, shrunk to seconds: what it leaves, that its staleness is bounded, that it is never overwritten."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.runs import events, run_to_end, sessions, small_run

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    directory = tmp_path_factory.mktemp("run")
    code, output = run_to_end(small_run(directory, "run.checkpoint_every=6"))
    assert code == 0, output
    assert not sessions(directory).exists() or not list(sessions(directory).iterdir()), "left in shared memory"
    return directory / "runs" / "small", output


def test_a_run_leaves_what_it_promises(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    for name in ("recipe.yaml", "events.jsonl", "metrics.jsonl", "samples.jsonl", "summary.json", "curves.png"):
        assert (run / name).stat().st_size > 0, name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) != []
    summary = json.loads((run / "summary.json").read_text())
    assert 0 <= summary["accuracy_before"] <= 1 and 0 <= summary["accuracy_after"] <= 1
    assert summary["rl_s"] > 0
    assert summary["max_staleness"] <= 2
    assert set(summary["accuracy_by_version"]) == {"0", "10", "12"}


def test_samples_can_be_read(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert "Spell this word backward" in sample["prompt"]
    assert set(sample) >= {"response", "ground_truth", "reward", "versions"}


def test_metrics_have_the_names_of_the_field(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    names: set[str] = set()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        names |= set(json.loads(line))
    assert names >= {
        "actor/entropy",
        "actor/grad_norm",
        "actor/pg_clipfrac",
        "actor/ppo_kl",
        "critic/rewards/mean",
        "critic/score/mean",
        "frac_reward_zero_std",
        "perf/tflops/actor",
        "perf/throughput",
        "perf/total_num_tokens",
        "response_length/mean",
        "timing_s/step",
        "training/off_policy/trajectory_staleness/max",
    }


def test_every_update_trained_one_whole_batch_of_whole_groups(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    trained = [event for event in events(run) if event["kind"] == "trained"]
    rows = Counter(tuple(event["key"]) for event in trained)
    assert max(rows.values()) == 1, "a row trained twice"
    by_update = Counter(event["update"] for event in trained)
    assert by_update == {update: 64 for update in range(12)}
    groups = Counter((event["update"], event["key"][1]) for event in trained)
    assert set(groups.values()) == {8}, "a group was split"


@pytest.mark.parametrize("bound", [0, 1, 2])
def test_no_token_is_older_than_the_bound(tmp_path: Path, bound: int, finished_run: tuple[Path, str]) -> None:
    """Counted from the event log alone: what the engine says it sampled under, against the update that took it."""
    run = finished_run[0]
    if bound != 2:
        code, output = run_to_end(small_run(tmp_path, f"staleness.max={bound}", "eval=null", steps=8))
        assert code == 0, output
        run = tmp_path / "runs" / "small"
    sampled = {tuple(event["key"]): event["versions"] for event in events(run) if event["kind"] == "sampled"}
    trained = [event for event in events(run) if event["kind"] == "trained"]
    lags = [event["update"] - version for event in trained for version, _ in sampled[tuple(event["key"])]]
    assert min(lags) >= 0 and max(lags) <= bound
    if bound:
        assert max(lags) > 0, "an asynchronous run in which nothing was ever stale tests nothing"


def test_a_run_is_never_overwritten(finished_run: tuple[Path, str]) -> None:
    run, _ = finished_run
    before = (run / "events.jsonl").read_bytes()
    code, output = run_to_end(small_run(run.parents[1]))
    assert code == 2
    assert "run.name: 'small'" in output and "never overwritten" in output
    assert (run / "events.jsonl").read_bytes() == before


def test_the_staleness_checker_agrees(finished_run: tuple[Path, str]) -> None:
    import subprocess
    import sys

    run, _ = finished_run
    done = subprocess.run(
        [sys.executable, "-m", "flowrl.report.staleness_check", str(run)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
