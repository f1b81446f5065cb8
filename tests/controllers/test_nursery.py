"""Workers that are forked from a process that has imported what they need are like those that are started."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import psutil

Start = Callable[..., Any]


def nurseries(run: Any) -> list[psutil.Process]:
    return [process for process in run.processes() if "controllers.nursery" in process.cmdline()]


def pid_of(run: Any, worker: str) -> int:
    return int(run.texts(worker, "starting")[-1].split()[-1])


def test_a_forked_worker_is_a_child_of_its_controller_and_leads_a_group(start: Start) -> None:
    run = start("with_child")
    run.wait_for(("idle.0.0", "running"), ("with_child.0.0", "running"))
    (nursery,) = nurseries(run)
    for name in ("idle.0.0", "with_child.0.0"):
        worker = psutil.Process(pid_of(run, name))
        assert worker.ppid() == run.popen.pid
        assert os.getpgid(worker.pid) == os.getsid(worker.pid) == worker.pid
        assert " ".join(worker.cmdline()).strip().endswith(f"-m controllers.worker {name}")
    assert not nursery.children(), "those that helped are gone"


def test_without_a_nursery_workers_are_started(start: Start) -> None:
    run = start("with_child", preload="")
    run.wait_for(("idle.0.0", "running"))
    assert not nurseries(run)
    psutil.Process(pid_of(run, "idle.0.0")).kill()
    run.wait_for(("idle.0.0", "down"), ("idle.0.0", "running"))


def test_a_nursery_that_dies_is_done_without(start: Start) -> None:
    run = start("with_child")
    run.wait_for(("idle.0.0", "running"), ("with_child.0.0", "running"))
    (nursery,) = nurseries(run)
    nursery.kill()
    worker = psutil.Process(pid_of(run, "idle.0.0"))
    assert worker.is_running(), "who was born there lives on"
    worker.kill()
    run.wait_for(("idle.0.0", "down"), ("idle.0.0", "running"))
    assert psutil.Process(pid_of(run, "idle.0.0")).ppid() == run.popen.pid
    os.kill(run.popen.pid, signal.SIGTERM)
    assert run.finish() == 128 + signal.SIGTERM
    run.assert_nothing_left()
