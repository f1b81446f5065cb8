"""Two controllers under torchrun on one machine: announcements, clock and ends cross from one to the other."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil
import pytest

from tests.controllers.conftest import Run

Start = Callable[..., Run]


@pytest.mark.slow
def test_clock_announcements_and_rendezvous_cross_nodes(start: Start) -> None:
    run = start("two_nodes", num_nodes=2)
    assert run.finish() == 0, run.describe()
    assert [event["report"] for event in run.events if event.get("worker") == "sink.0.0" and "report" in event] == [
        {"nodes": 2.0}
    ], "rows of both nodes were trained"
    assert (run.run_dir / "met-0").read_text() == (run.run_dir / "met-1").read_text()
    assert not [event for event in run.events if event.get("topic") == "local" and event["node"] == 1]
    run.assert_nothing_left()


@pytest.mark.slow
def test_lost_node_is_named_and_ends_the_run(start: Start) -> None:
    """A controller that stands still, its workers alive: only the other node's heartbeats can tell."""
    run = start("two_nodes_idle", num_nodes=2)
    run.wait_for(("idle.0.0", "running"), ("idle.1.0", "running"))
    (frozen,) = [
        process
        for process in psutil.Process(run.popen.pid).children()
        if process.environ().get("RANK") == "1" and "scenarios.py" in " ".join(process.cmdline())
    ]
    frozen.send_signal(signal.SIGSTOP)
    run.wait_for(("idle.0.0", "done"))
    os.kill(frozen.pid, signal.SIGKILL)
    assert run.finish() == 1
    ends = [event for event in run.events if "end" in event]
    assert [end["node"] for end in ends] == [0]
    assert "node 1 (" in ends[0]["reason"] and "is lost" in ends[0]["reason"]
    run.assert_nothing_left(within_s=2.0)
