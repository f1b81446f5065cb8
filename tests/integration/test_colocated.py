"""Engine and trainer on one device: they take turns, whatever dies, and memory goes from one to the other."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from flowrl.report.device_turns import Turn, describe, turns
from flowrl.report.events import read_events
from flowrl.report.staleness_check import check_run
from tests.integration.runs import events, finish, started, trained_updates, wait_until, workers
from tests.integration.test_resume import command

pytestmark = pytest.mark.timeout(300)
STEPS = 16
ONE_DEVICE = "pools={rollout: {devices: [cpu:0]}, train: {devices: [cpu:0]}}"
SLACK_S = 0.1
"""A sample is logged by the engine's loop, which may come to it a moment after the engine has stopped."""


def is_within(t: float, turns_of_worker: list[Turn]) -> bool:
    return any(turn.begins <= t <= turn.ends + SLACK_S for turn in turns_of_worker)


@pytest.mark.slow
def test_on_two_nodes_some_engines_take_turns_and_the_others_sample_all_the_time(tmp_path: Path) -> None:
    """Hybrid: two engines a node, one of them at the trainer rank's device."""
    run = tmp_path / "runs" / "two"
    pools = "pools={rollout: {devices: [cpu:0, cpu:1], workers: 2}, train: {devices: [cpu:1]}}"
    arguments = command(tmp_path, "two", pools, "rollout.in_flight=abort", "train.steps=12", nodes=2)
    with started(arguments) as process:
        output = finish(process, 250)
        assert process.returncode == 0, output
    found = turns(read_events(run / "events.jsonl"))
    assert set(found) == {(0, "cpu:1"), (1, "cpu:1")}
    for (node, _), told in found.items():
        assert told.overlaps == [], describe(found)
        assert {turn.worker for turn in told.turns} == {f"rollout.{node}.1", f"train.{node}.0"}
    findings = check_run(run)
    assert findings.is_clean and findings.total("trained") == 12 * 32


def test_on_one_device_engine_and_trainer_take_turns_though_the_engine_is_killed(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    arguments = command(
        tmp_path, "one", ONE_DEVICE, "rollout.in_flight=recompute", "staleness.max=1", f"train.steps={STEPS}",
        "rollout.max_tokens=32",
    )  # fmt: skip
    with started(arguments) as process:
        wait_until(lambda: trained_updates(run) >= 3, 200, "3 updates")
        os.kill(workers(process)["rollout.0.0"], signal.SIGKILL)
        output = finish(process, 200)
        assert process.returncode == 0, output
    (told,) = turns(read_events(run / "events.jsonl")).values()
    assert told.overlaps == [], describe({(0, "cpu:0"): told})
    by_worker = {name: [turn for turn in told.turns if turn.worker == name] for name in ("rollout.0.0", "train.0.0")}
    assert len(by_worker["train.0.0"]) == STEPS + 1, "one before the first update, one for each"
    for event in events(run):
        if event["kind"] in ("sampled", "trained"):
            worker = "rollout.0.0" if event["kind"] == "sampled" else "train.0.0"
            assert is_within(event["t"], by_worker[worker]), event
    held, kept = zip(*told.memory["rollout.0.0"], strict=True)
    assert max(held) - min(kept) > 4, "MiB that the engine's KV takes, and gives back"
    findings = check_run(run)
    assert findings.is_clean and findings.total("trained") == STEPS * 32
