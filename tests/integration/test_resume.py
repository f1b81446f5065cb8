"""A run that was killed goes on: from its newest checkpoint, with its rows, on other nodes, and as if never stopped."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from flowrl.report.staleness_check import check_run
from tests.integration.runs import (
    ROOT,
    alive,
    events_so_far,
    finish,
    sessions,
    started,
    trained_updates,
    wait_until,
    workers,
)  # fmt: skip
from tests.integration.test_determinism import STRICT, TINY, assert_same_bits, metrics_by_step, tiny_run

pytestmark = pytest.mark.timeout(800)
GROUP, BATCH = 4, 32


def command(
    directory: Path, name: str, *overrides: str, nodes: int = 1, restarts: int = 0, recipe: str = "quickstart"
) -> list[str]:
    launcher = ["-m", "flowrl"]
    if nodes > 1:
        elastic = [f"--nproc-per-node={nodes}", f"--max-restarts={restarts}", "--standalone"]
        launcher = ["-m", "torch.distributed.run", *elastic, "-m", "flowrl"]
    return [
        sys.executable, *launcher, "run", str(ROOT / f"recipes/{recipe}.yaml"), *TINY, f"run.name={name}",
        f"run.dir={directory}/runs", f"model.path={directory}/model", f"run.session_dir={sessions(directory)}",
        *overrides,
    ]  # fmt: skip


def kill_all_after(update: int, arguments: list[str], run: Path) -> None:
    """SIGKILL to the controller, with which its workers die, once that many updates are trained."""
    with started(arguments) as process:

        def has_trained() -> bool:
            assert process.poll() is None, finish(process, 5)
            return trained_updates(run) >= update

        wait_until(has_trained, 200, f"{update} updates")
        everyone = list(workers(process).values())
        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)
        wait_until(lambda: not alive(everyone), 10, "the workers to die")


def run_to_its_end(arguments: list[str]) -> str:
    with started(arguments) as process:
        output = finish(process, 250)
        assert process.returncode == 0, output
    return output


def rows_that_count(run: Path) -> Counter[tuple[Any, ...]]:
    """(group, index) trained in updates that no later life undid. Attempts differ where a prompt was sampled again."""
    trained: dict[int, list[tuple[Any, ...]]] = {}
    life = 0
    for event in events_so_far(run / "events.jsonl"):
        if event["kind"] == "resumed" and event["life"] != life:
            life = event["life"]
            trained = {update: rows for update, rows in trained.items() if update < event["version"]}
        elif event["kind"] == "trained":
            trained.setdefault(event["update"], []).append(tuple(event["key"][1:3]))
    assert {update: len(rows) for update, rows in trained.items()} == dict.fromkeys(trained, BATCH)
    return Counter(row for rows in trained.values() for row in rows)


def rows_brought_over(run: Path) -> int:
    """Rows trained that an earlier life than the one that trained them had sampled: their attempts are counted so."""
    life = brought = 0
    for event in events_so_far(run / "events.jsonl"):
        if event["kind"] == "resumed":
            life = event["life"]
        elif event["kind"] == "trained":
            brought += event["key"][3] < 1000 * life
    return brought


def assert_no_row_twice_and_none_lost(run: Path, steps: int, bound: int, shards: int = 1) -> None:
    rows = rows_that_count(run)
    assert len(rows) == steps * BATCH and set(rows.values()) == {1}
    if shards == 1:
        # What is not trained yet is at most what the bound lets be under way beside it. (Several shards number their
        # groups each at its own pace.)
        assert max(group for group, _ in rows) < (steps + bound + 1) * BATCH // GROUP
    findings = check_run(run)
    assert findings.is_clean and findings.lives > 1, findings


def test_a_strict_run_that_was_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    whole = tiny_run(tmp_path, "whole", *STRICT)
    run = tmp_path / "runs" / "cut"
    arguments = command(tmp_path, "cut", *STRICT, "run.checkpoint_every=2")
    kill_all_after(3, arguments, run)
    run_to_its_end([*arguments, "--resume"])
    assert_same_bits(whole / "model", run / "model")
    assert metrics_by_step(whole) == metrics_by_step(run)
    lives = [json.loads(line) for line in (run / "lives.jsonl").read_text().splitlines()]
    assert [life["step"] for life in lives] == [0, 2]


@pytest.mark.slow
def test_an_asynchronous_run_loses_no_row_and_trains_none_twice(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "async"
    arguments = command(tmp_path, "async", "run.checkpoint_every=3", "train.steps=12")
    kill_all_after(5, arguments, run)
    kill_all_after(8, [*arguments, "--resume"], run)
    run_to_its_end([*arguments, "--resume"])
    assert_no_row_twice_and_none_lost(run, 12, bound=2)
    assert rows_brought_over(run) > 0, "a checkpoint has the rows that lie sampled in the queue"
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    replayed = run_to_its_end([sys.executable, "-m", "flowrl", "replay", str(run)])
    assert "12 updates replayed" in replayed
    assert_same_bits(run / "model", run / "replay" / "model")


@pytest.mark.slow
def test_a_killed_node_makes_torchrun_start_all_again_and_one_node_can_go_on_alone(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "two"
    overrides = ("run.checkpoint_every=2", "train.steps=6")
    with started(command(tmp_path, "two", *overrides, nodes=2, restarts=2)) as process:
        wait_until(lambda: trained_updates(run) >= 3, 200, "3 updates")
        os.kill(controllers_of(process.pid)[1], signal.SIGKILL)
        output = finish(process, 250)
        assert process.returncode == 0, output
    assert_no_row_twice_and_none_lost(run, 6, bound=2, shards=2)
    run_to_its_end([*command(tmp_path, "two", "run.checkpoint_every=2", "train.steps=8"), "--resume"])
    assert_no_row_twice_and_none_lost(run, 8, bound=2, shards=2)


@pytest.mark.slow
def test_a_run_of_one_node_goes_on_on_two(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "grown"
    overrides = ("run.checkpoint_every=3", "train.steps=24")
    kill_all_after(5, command(tmp_path, "grown", *overrides), run)
    run_to_its_end([*command(tmp_path, "grown", *overrides, nodes=2), "--resume"])
    assert_no_row_twice_and_none_lost(run, 24, bound=2, shards=2)
    _, resumed_at = (json.loads(line)["step"] for line in (run / "lives.jsonl").read_text().splitlines())
    begun = groups_begun_before(run, resumed_at)
    assert len(begun) > resumed_at * BATCH // GROUP > 0, "groups were under way"
    assert begun <= {group for group, _ in rows_that_count(run)}
    second_life = events_of_the_last_life(run)
    for kind in ("reserved", "sampled", "trained"):
        assert {event["node"] for event in second_life if event["kind"] == kind} == {0, 1}, kind
    assert json.loads((run / "summary.json").read_text())["steps"] == 24


def groups_begun_before(run: Path, step: int) -> set[int]:
    """By the version that a reservation names: with those made just after it, where an engine had no newer weights."""
    return {
        event["key"][1]
        for event in events_so_far(run / "events.jsonl")
        if event["kind"] == "reserved" and event["version"] < step
    }


def events_of_the_last_life(run: Path) -> list[dict[str, Any]]:
    log = events_so_far(run / "events.jsonl")
    begins = max(place for place, event in enumerate(log) if event["kind"] == "resumed")
    return log[begins:]


def controllers_of(torchrun: int) -> list[int]:
    import psutil

    children = psutil.Process(torchrun).children()
    return [child.pid for child in children if "flowrl" in " ".join(child.cmdline())]


def test_a_resumed_run_may_not_compute_something_else(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, "done", "train.steps=2")
    for arguments, text in (
        (["train.learning_rate=1"], "train.learning_rate: 1.0; the run to be resumed has 0.003"),
        (["run.name=another"], "holds no run to resume"),
    ):
        with started([*command(tmp_path, "done", "train.steps=2", *arguments), "--resume"]) as process:
            output = finish(process, 120)
        assert process.returncode == 2 and text in output, output
    assert run.is_dir()
