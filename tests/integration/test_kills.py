"""Death (SIGKILL) and hang (SIGSTOP) of every worker of a real run, and of its controller: each line of the table in
docs/reliability.md. Recovery or a clean stop, never a silent hang, an orphan or a leftover."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from flowrl.cli.main import main
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
from tests.integration.test_resume import command, rows_that_count

pytestmark = pytest.mark.timeout(600)
START_S = 200
BACK_S = 200
HEARTBEAT_S = 10
STOP_S = 25
VICTIMS = ("rollout.0.0", "stages.0.0", "evaluate.0.0")
EVALUATED = ("data.held_out=20", "eval={every: 10, limit: 20}")


def leftovers(directory: Path) -> list[Path]:
    return list(sessions(directory).iterdir()) if sessions(directory).exists() else []


def wait_for_update(process: subprocess.Popen[str], run: Path, update: int) -> None:
    def has_trained() -> bool:
        assert process.poll() is None, finish(process, 5)
        return trained_updates(run) >= update

    wait_until(has_trained, START_S, f"{update} updates")


def hit(process: subprocess.Popen[str], victims: Sequence[str], signum: int) -> None:
    """Signals the workers, and waits until they have other processes."""
    hurt = {victim: workers(process)[victim] for victim in victims}
    for pid in hurt.values():
        os.kill(pid, signum)

    def are_back() -> bool:
        now = workers(process)
        return all(now.get(victim, pid) != pid for victim, pid in hurt.items())

    wait_until(are_back, BACK_S, f"{', '.join(victims)} to come back")


@pytest.mark.parametrize("signum", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=pytest.mark.slow)])
def test_engine_stages_and_evaluation_come_back_and_the_run_ends_well(tmp_path: Path, signum: signal.Signals) -> None:
    run = tmp_path / "runs" / "hurt"
    steps = 20
    arguments = command(tmp_path, "hurt", *EVALUATED, f"train.steps={steps}", f"run.heartbeat_s={HEARTBEAT_S}")
    with started(arguments) as process:
        wait_for_update(process, run, 2)
        everyone = list(workers(process).values())
        hit(process, VICTIMS, signum)
        everyone += workers(process).values()
        output = finish(process, 200)
        assert process.returncode == 0, output
    for victim in VICTIMS:
        assert f"{victim}: " in output
    assert output.count("signal SIGKILL; restart 1") == 3
    if signum == signal.SIGSTOP:
        assert output.count("silent for ") == 3
    rows = rows_that_count(run)
    assert len(rows) == steps * 32 and set(rows.values()) == {1}
    assert check_run(run).is_clean
    assert alive(everyone) == []
    assert leftovers(tmp_path) == []


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSTOP])
def test_relays_come_back_and_weights_cross_nodes_again(tmp_path: Path, signum: signal.Signals) -> None:
    run = tmp_path / "runs" / "hurt"
    steps = 100
    arguments = command(
        tmp_path, "hurt", f"train.steps={steps}", f"run.heartbeat_s={HEARTBEAT_S}", nodes=2
    )  # fmt: skip
    with started(arguments) as process:
        wait_for_update(process, run, 2)
        hit(process, ("relay.0.0", "relay.1.0"), signum)
        output = finish(process, 250)
        assert process.returncode == 0, output
    rows = rows_that_count(run)
    assert len(rows) == steps * 32 and set(rows.values()) == {1}
    assert check_run(run).is_clean
    newest = {node: 0 for node in (0, 1)}
    for event in events_so_far(run / "events.jsonl"):
        if event["kind"] == "dispatched":
            newest[event["node"]] = max(newest[event["node"]], event["version"])
    assert min(newest.values()) > 0.7 * steps, newest
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("first", "second"), [(("train", signal.SIGKILL), ("queue", signal.SIGSTOP)),
                          pytest.param(("queue", signal.SIGKILL), ("train", signal.SIGSTOP), marks=pytest.mark.slow)],
)  # fmt: skip
def test_without_trainer_or_shard_a_run_goes_on_from_its_checkpoint(
    tmp_path: Path, first: tuple[str, signal.Signals], second: tuple[str, signal.Signals]
) -> None:
    run = tmp_path / "runs" / "hurt"
    arguments = command(
        tmp_path, "hurt", "train.steps=40", "run.checkpoint_every=3", f"run.heartbeat_s={HEARTBEAT_S}"
    )  # fmt: skip
    with started(arguments) as process:
        for life, (kind, signum) in enumerate((first, second)):
            wait_until(lambda life=life: lives(run) == life + 1, START_S, f"life {life}")
            begins = json.loads((run / "lives.jsonl").read_text().splitlines()[-1])["step"]
            wait_for_update(process, run, begins + 4)
            os.kill(workers(process)[f"{kind}.0.0"], signum)
        output = finish(process, 200)
        assert process.returncode == 0, output
    assert output.count("going on from step") == 2
    for kind, _ in (first, second):
        assert f"worker {kind}.0.0 died" in output
    assert f"silent for {HEARTBEAT_S}" in output
    rows = rows_that_count(run)
    assert len(rows) == 40 * 32 and set(rows.values()) == {1}
    findings = check_run(run)
    assert findings.is_clean and findings.lives == 3
    assert leftovers(tmp_path) == []


def lives(run: Path) -> int:
    path = run / "lives.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_six_kill_rounds_leave_what_an_undisturbed_run_leaves() -> None:
    """The benchmark itself, which has a hundred."""
    done = subprocess.run(
        [sys.executable, "benchmarks/kill_rounds.py", "--rounds", "6"], cwd=ROOT, capture_output=True, text=True,
        timeout=550, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything held" in done.stdout


@pytest.mark.slow
def test_without_a_checkpoint_the_death_of_a_trainer_ends_the_run_by_name(tmp_path: Path) -> None:
    with started(command(tmp_path, "hurt", "train.steps=4000", "run.checkpoint_every=0")) as process:
        wait_for_update(process, tmp_path / "runs" / "hurt", 2)
        everyone = dict(workers(process))
        os.kill(everyone["train.0.0"], signal.SIGKILL)
        output = finish(process, 100)
        assert process.returncode not in (0, None)
    assert "train.0.0" in output and "SIGKILL" in output
    assert alive(list(everyone.values())) == []
    assert leftovers(tmp_path) == []


def engines_join_and_leave(process: subprocess.Popen[str], run: Path) -> None:
    """A second engine comes, and samples; the first two go, and nothing is sampled; one comes again."""

    def has_worked(engine: str, after: int) -> bool:
        log = events_so_far(run / "events.jsonl")[after:]
        return any(event["kind"] == "reserved" and event["producer"] == engine for event in log)

    assert main(["engines", str(run), "2"]) == 0
    wait_until(lambda: has_worked("rollout.0.1", 0), BACK_S, "a second engine")
    assert main(["engines", str(run), "0"]) == 0
    wait_until(lambda: not any(name.startswith("rollout") for name in workers(process)), BACK_S, "the engines to leave")
    seen = len(events_so_far(run / "events.jsonl"))
    assert main(["engines", str(run), "1"]) == 0
    wait_until(lambda: has_worked("rollout.0.0", seen), BACK_S, "the first engine to come again")
    wait_for_update(process, run, trained_updates(run) + 3)
    assert "rollout.0.1" not in workers(process)


@pytest.mark.parametrize("signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_stops_the_run_in_order_and_it_goes_on_from_there(tmp_path: Path, signum: signal.Signals) -> None:
    run = tmp_path / "runs" / "hurt"
    with started(command(tmp_path, "hurt", "train.steps=4000")) as process:
        wait_for_update(process, run, 2)
        if signum == signal.SIGINT:
            engines_join_and_leave(process, run)
        everyone = dict(workers(process))
        process.send_signal(signum)
        output = finish(process, 100)
        assert process.returncode not in (0, None), output
    assert "Traceback" not in output
    assert check_run(run).is_clean
    assert alive(list(everyone.values())) == []
    assert leftovers(tmp_path) == []
    goes_on_where_it_stopped(tmp_path, run)


def goes_on_where_it_stopped(tmp_path: Path, run: Path) -> None:
    """No update is lost."""
    done = max(event["update"] for event in events_so_far(run / "events.jsonl") if event["kind"] == "trained") + 1
    assert (run / "checkpoints" / f"step_{done}").is_dir()
    steps = done + 2
    with started([*command(tmp_path, run.name, f"train.steps={steps}"), "--resume"]) as process:
        output = finish(process, 200)
        assert process.returncode == 0, output
    assert json.loads((run / "lives.jsonl").read_text().splitlines()[-1])["step"] == done
    rows = rows_that_count(run)
    assert len(rows) == steps * 32 and set(rows.values()) == {1}
    assert check_run(run).is_clean


@pytest.mark.slow
def test_two_trainer_ranks_leave_an_update_together_when_they_are_stopped(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "pair"
    with started(command(tmp_path, "pair", "train.steps=4000", "pools.train.workers=2")) as process:
        wait_for_update(process, run, 2)
        process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        output = finish(process, 100)
        assert time.monotonic() - began < STOP_S, "ranks wait for each other, and were ended by signals"
    assert "Traceback" not in output
    goes_on_where_it_stopped(tmp_path, run)


@pytest.mark.slow
def test_a_controller_that_was_stopped_for_long_goes_on_and_a_killed_one_takes_everything_with_it(
    tmp_path: Path,
) -> None:
    run = tmp_path / "runs" / "hurt"
    with started(command(tmp_path, "hurt", "train.steps=4000", "run.heartbeat_s=3")) as process:
        wait_for_update(process, run, 2)
        everyone = dict(workers(process))
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(5)
        os.kill(process.pid, signal.SIGCONT)
        wait_for_update(process, run, trained_updates(run) + 5)
        assert dict(workers(process)) == everyone, "a worker was taken for hung while its controller was"
        os.kill(process.pid, signal.SIGKILL)
        process.wait(5)
        wait_until(lambda: not alive(list(everyone.values())), 10, "the children to die")
        wait_until(lambda: not leftovers(tmp_path), 10, "the session directory to go")
