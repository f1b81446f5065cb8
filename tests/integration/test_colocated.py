"""Engine and trainer on one device: they take turns, whatever dies, and memory goes from one to the other."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from itertools import pairwise
from pathlib import Path
from subprocess import Popen

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


LARGER_MODEL = (
    "model.init={hidden_size: 512, layers: 4, heads: 8, kv_heads: 8, intermediate_size: 1536, max_tokens: 64,"
    " rope_theta: 30, lowercase: true}"
)


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


@pytest.mark.slow
def test_whoever_gives_the_device_on_gives_its_memory_back_to_the_system(tmp_path: Path) -> None:
    """Seen from outside. Gradients of this model alone are 54 MiB, keys and values of 64 responses as many."""
    run = tmp_path / "runs" / "one"
    overrides = ("staleness.max=0", "rollout.group_size=8", "rollout.max_tokens=32", "train.steps=4")
    with started(command(tmp_path, "one", ONE_DEVICE, LARGER_MODEL, "run.checkpoint_every=0", *overrides)) as process:
        wait_until(lambda: trained_updates(run) >= 1, 200, "the first update")
        pids = {name: workers(process)[name] for name in ("rollout.0.0", "train.0.0")}
        resident = resident_until_the_end(process, pids)
        assert process.returncode == 0, finish(process, 5)
    (told,) = turns(read_events(run / "events.jsonl")).values()
    watched = [turn for turn in told.turns if turn.begins > resident[0][0]]
    given_back: dict[str, list[float]] = {"rollout.0.0": [], "train.0.0": []}
    for turn, others in pairwise(watched[:-1]):  # with the run's end come a checkpoint and an export
        given_back[turn.worker].append(most_mb(resident, turn.worker, turn) - most_mb(resident, turn.worker, others))
    assert min(map(len, given_back.values())) >= 2, "turns that were seen"
    assert min(given_back["train.0.0"]) > 200, given_back
    assert min(given_back["rollout.0.0"]) > 30, given_back


def resident_until_the_end(process: Popen[str], pids: dict[str, int]) -> list[tuple[float, dict[str, float]]]:
    """(time, worker -> MiB of its own memory that are resident), every hundredth of a second."""
    seen = []
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):  # workers end a little before
            seen.append((time.time(), {name: resident_mb(pid) for name, pid in pids.items()}))
        time.sleep(0.01)
    return seen


def resident_mb(pid: int) -> float:
    """Raises ValueError for a process that is dead."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (anonymous,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(anonymous.split()[1]) / 2**10


def most_mb(resident: list[tuple[float, dict[str, float]]], worker: str, turn: Turn) -> float:
    """Within the turn, whosever it is."""
    return max(held[worker] for t, held in resident if turn.begins <= t <= turn.ends)
