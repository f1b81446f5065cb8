"""A run that goes on: `kill -USR1` says where everything stands, and its event log rotates without losing a line."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flowrl.report.events import segments
from flowrl.report.staleness_check import check_run
from tests.integration.runs import command, finish, sessions, started, wait_until, workers

WORKERS = {"queue.0.0", "rollout.0.0", "stages.0.0", "train.0.0"}


@pytest.mark.timeout(200)
def test_a_signal_shows_stacks_and_waits_of_the_controller_and_every_worker(tmp_path: Path) -> None:
    arguments = command(
        "warm_start=null", "eval=null", "train.batch_groups=8", "train.steps=1000000", "data.size=2000",
        "model.init.layers=1", "model.init.hidden_size=32", "rollout.max_tokens=2", "run.events_max_mb=1",
        "run.name=going", f"run.dir={tmp_path}/runs", f"model.path={tmp_path}/model",
        f"run.session_dir={sessions(tmp_path)}",
    )  # fmt: skip
    run = tmp_path / "runs" / "going"
    with started(arguments) as process:
        wait_until((run / "events.1.jsonl").exists, 150, "the first full segment")
        before = workers(process)
        assert set(before) == WORKERS
        os.kill(process.pid, signal.SIGUSR1)
        wait_until(lambda: all(has_shown(run, name) for name in WORKERS), 20, "every worker's stacks")
        assert workers(process) == before, "nobody died of it"
        os.kill(process.pid, signal.SIGTERM)
        output = finish(process, 60)
    assert "most recent call first" in output and "controller of node 0: working" in output
    for name in WORKERS:
        assert f"{name}: running, process {before[name]}, heard" in output
    assert "waits for" in (run / "logs" / "stages.0.0.log").read_text()
    closed = segments(run / "events.jsonl")[:-1]
    assert closed and all(segment.stat().st_size >= 1 << 20 for segment in closed)
    findings = check_run(run)
    assert findings.is_clean
    assert findings.total("trained") >= 8 * 8


def has_shown(run: Path, worker: str) -> bool:
    text = (run / "logs" / f"{worker}.log").read_text()
    return "most recent call first" in text and "waits for" in text
