"""SIGKILL and signals during a real run: recovery or a clean stop, never a hang, an orphan or a leftover."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.integration.runs import (
    alive,
    events,
    finish,
    sessions,
    small_run,
    started,
    trained_updates,
    wait_until,
    workers,
)  # fmt: skip

pytestmark = pytest.mark.timeout(240)
START_S = 60


def leftovers(directory: Path) -> list[Path]:
    return list(sessions(directory).iterdir()) if sessions(directory).exists() else []


def wait_for_training(process: subprocess.Popen[str], run: Path) -> None:
    def has_trained() -> bool:
        assert process.poll() is None, finish(process, 5)
        return trained_updates(run) >= 2

    wait_until(has_trained, START_S, "the first updates")


@pytest.mark.parametrize("victim", ["rollout.0.0", "stages.0.0", "evaluate.0.0"])
def test_a_killed_worker_comes_back_and_the_run_ends_well(tmp_path: Path, victim: str) -> None:
    run = tmp_path / "runs" / "small"
    with started(small_run(tmp_path, steps=40)) as process:
        wait_for_training(process, run)
        everyone = dict(workers(process))
        os.kill(everyone[victim], signal.SIGKILL)
        output = finish(process, 150)
        assert process.returncode == 0, output
    assert victim in output and "SIGKILL" in output
    assert json.loads((run / "summary.json").read_text())["steps"] == 40
    trained = [tuple(event["key"]) for event in events(run) if event["kind"] == "trained"]
    assert len(trained) == len(set(trained)) == 40 * 64
    sampled = {tuple(event["key"]): event["versions"] for event in events(run) if event["kind"] == "sampled"}
    updates = {tuple(event["key"]): event["update"] for event in events(run) if event["kind"] == "trained"}
    assert max(update - sampled[key][0][0] for key, update in updates.items()) <= 2
    assert alive(list(everyone.values())) == []
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("victim", ["train.0.0", "queue.0.0"])
def test_a_death_that_ends_the_run_is_named(tmp_path: Path, victim: str) -> None:
    with started(small_run(tmp_path, steps=400)) as process:
        wait_for_training(process, tmp_path / "runs" / "small")
        everyone = dict(workers(process))
        os.kill(everyone[victim], signal.SIGKILL)
        output = finish(process, 30)
        assert process.returncode not in (0, None)
    assert victim in output and "SIGKILL" in output
    assert alive(list(everyone.values())) == []
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_in_order(tmp_path: Path, signum: signal.Signals) -> None:
    with started(small_run(tmp_path, steps=400)) as process:
        wait_for_training(process, tmp_path / "runs" / "small")
        everyone = dict(workers(process))
        process.send_signal(signum)
        output = finish(process, 30)
        assert process.returncode not in (0, None), output
    assert "Traceback" not in output
    assert alive(list(everyone.values())) == []
    assert leftovers(tmp_path) == []


def test_nothing_survives_a_killed_controller(tmp_path: Path) -> None:
    with started(small_run(tmp_path, steps=400)) as process:
        wait_for_training(process, tmp_path / "runs" / "small")
        everyone = list(workers(process).values())
        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)
        wait_until(lambda: not alive(everyone), 5, "the children to die")
        wait_until(lambda: not leftovers(tmp_path), 5, "the session directory to go")
