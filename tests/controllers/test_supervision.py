"""What becomes of workers that fail, die, fall silent or will not stop: real processes, real signals."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import psutil

from tests.controllers.conftest import Run

Start = Callable[..., Run]
GRACE_S = 5.0
"""Of scenario "deaf"."""


def is_running(pid: int) -> bool:
    """A dead one whose new parent has not taken note of its death is still listed."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_run_ends_for_all_when_a_worker_announces_it(start: Start) -> None:
    run = start("finisher")
    assert run.finish() == 0, run.describe()
    assert run.end["reason"] == "finisher.0.0 announced the end"
    assert run.texts("idle.0.0", "done") == ["stopped: exit code 0"]
    assert "stopped in good order" in (run.run_dir / "logs" / "idle.0.0.log").read_text()
    run.assert_nothing_left()


def test_run_ends_when_all_drivers_have_and_after_means_after(start: Start) -> None:
    run = start("returners")
    assert run.finish() == 0, run.describe()
    assert run.end["reason"] == "all drivers have finished"
    assert [(run.run_dir / f"order-{worker}").read_text() for worker in ("first", "second")] == ["0", "1"]


def test_failure_names_worker_reason_log_and_its_last_lines(start: Start) -> None:
    run = start("crasher")
    assert run.finish() == 1
    reason = run.end["reason"]
    assert reason.startswith("worker crasher.0.0 died: ValueError: the moon is full, exit code 1; its log, ")
    assert str(run.run_dir / "logs" / "crasher.0.0.log") in reason
    assert "ValueError: the moon is full" in reason.splitlines()[-2], "before the frame of the group of errors"
    assert run.texts("idle.0.0", "done") == ["stopped: exit code 0"]
    run.assert_nothing_left()


def test_failing_callback_ends_its_worker(start: Start) -> None:
    run = start("bad_callback")
    assert run.finish() == 1
    assert "in the control thread: KeyError('no such field')" in run.end["reason"]


def test_killed_worker_is_restarted_and_its_children_are_gone(start: Start) -> None:
    run = start("suicide")
    assert run.finish() == 0, run.describe()
    assert run.texts("suicide.0.0", "down") == ["signal SIGKILL; restart 1 in 0.1 s"]
    assert len(run.texts("suicide.0.0", "starting")) == 2
    assert not is_running(int((run.run_dir / "first-life").read_text()))
    run.assert_nothing_left()


def test_worker_that_dies_again_and_again_fails_the_run(start: Start) -> None:
    run = start("mortal")
    assert run.finish() == 1
    assert len(run.texts("mortal.0.0", "starting")) == 3
    assert run.end["reason"].startswith("worker mortal.0.0 died 3 times in a row: signal SIGKILL; ")
    assert run.end["reason"].endswith("last words")


def test_worker_deaf_to_stop_and_sigterm_is_killed(start: Start) -> None:
    run = start("stubborn")
    assert run.finish() == 0
    assert run.texts("stubborn.0.0", "done") == ["stopped: signal SIGKILL"]
    run.assert_nothing_left()


def test_silent_worker_is_killed_and_named_with_what_it_waited_for(start: Start) -> None:
    run = start("frozen")
    assert run.finish() == 1
    reason = run.end["reason"]
    assert reason.startswith("worker frozen.0.0 died: silent for 3."), reason
    assert "when last heard it was waiting for a coin" in reason
    run.assert_nothing_left()


def test_stuck_worker_leaves_its_stack_in_the_log(start: Start) -> None:
    run = start("stuck")
    assert run.finish() == 1
    assert "when last heard it was at work" in run.end["reason"]
    assert "in stuck" in (run.run_dir / "logs" / "stuck.0.0.log").read_text()


def test_nothing_survives_a_controller_that_is_killed(start: Start) -> None:
    run = start("with_child")
    run.wait_for(("idle.0.0", "running"), ("with_child.0.0", "running"))
    assert len(run.processes()) >= 4, "two workers, a child, the reaper"
    os.kill(run.popen.pid, signal.SIGKILL)
    run.assert_nothing_left(within_s=2.0)


def test_signals_end_a_run_in_good_order(start: Start) -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        run = start("with_child")
        run.wait_for(("idle.0.0", "running"), ("with_child.0.0", "running"))
        os.kill(run.popen.pid, signum)
        assert run.finish() == 128 + signum
        assert run.end["reason"] == f"ended by {signum.name}"
        assert run.texts("idle.0.0", "done") == run.texts("with_child.0.0", "done") == ["stopped: exit code 0"]
        run.assert_nothing_left()


def test_second_interrupt_waits_for_nobody(start: Start) -> None:
    run = start("deaf")
    run.wait_for(("stubborn.0.0", "running"))
    os.kill(run.popen.pid, signal.SIGINT)
    run.wait_for(("stubborn.0.0", "stopping"))
    os.kill(run.popen.pid, signal.SIGINT)
    began = time.monotonic()
    assert run.finish() == 130
    assert time.monotonic() - began < GRACE_S
    run.assert_nothing_left()


def test_announcements_reach_those_who_start_later(start: Start) -> None:
    run = start("retained")
    assert run.finish() == 0, run.describe()
    assert {"node": 0, "report": {"speed": 1.5}, "worker": "herald.0.0", "step": 3} in run.events
    assert [event["payload"] for event in run.events if event.get("topic") == "version"] == [
        {"version": version} for version in range(3)
    ]
