"""Runs one small graph under a real NodeController and prints what its observers hear, a JSON object a line.

`python scenarios.py NAME RUN_DIR SESSION_ROOT`, alone or under torchrun.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from controllers.graph import Graph
from controllers.node import NodeController
from controllers.placement import Pool, plan
from controllers.settings import ControllerSettings, Observers, QueueSettings, WorkerSettings
from controllers.stage import Kind, Stage, Unit
from controllers.supervisor import Limits
from controllers.topology import Topology

_LIMITS = Limits(heartbeat_s=3.0, grace_s=1.0, stop_s=1.0, stall_s=2.0, kill_s=0.5, max_restarts=2, backoff_s=0.1)
_PATIENT = replace(_LIMITS, heartbeat_s=30.0, grace_s=5.0, stop_s=5.0)
_ALL = Pool(name="cpu")
_FIRST = Pool(name="first", nodes=(0,))


def driver(name: str, target: str = "", **fields: Any) -> Stage:
    return Stage(name=name, run=f"scenario_workers:{target or name}", kind=Kind.DRIVER, **fields)


def arithmetic(multiply: str, pool: str = "cpu", awaits: tuple[str, ...] = ()) -> list[Stage]:
    return [
        driver("source", writes=("number",)),
        Stage(
            name="multiply", run=f"scenario_workers:{multiply}", reads=("number",), writes=("product",), worker="maths",
            settings={"factor": 3},
        ),
        Stage(
            name="add", run="scenario_workers:GroupSum", unit=Unit.GROUP, reads=("product",), writes=("sum",),
            worker="maths",
        ),
        driver(
            "sink", reads=("number", "sum"), unit=Unit.BATCH, pool=pool,
            settings={"updates": 5, "batch_rows": 8, "awaits": list(awaits)},
        ),
    ]  # fmt: skip


STAGES: dict[str, list[Stage]] = {
    "idle": [driver("idle")],
    "with_child": [driver("idle"), driver("with_child")],
    "finisher": [driver("finisher"), driver("idle")],
    "returners": [driver("second", "returner", after=("first",)), driver("first", "returner")],
    "crasher": [driver("crasher"), driver("idle")],
    "bad_callback": [driver("bad_callback")],
    "suicide": [driver("suicide")],
    "mortal": [driver("mortal"), driver("idle")],
    "stubborn": [driver("stubborn"), driver("finisher")],
    "deaf": [driver("stubborn")],
    "frozen": [driver("frozen")],
    "stuck": [driver("stuck")],
    "retained": [driver("herald"), driver("last_version"), driver("late_listener", after=("last_version",))],
    "queue": arithmetic("Double"),
    "mortal_stage": arithmetic("MortalDouble"),
    "broken_stage": arithmetic("Broken"),
    "stalled_stage": arithmetic("Stalled"),
    "two_nodes": [
        *arithmetic("Double", pool="first", awaits=("met/0", "met/1")),
        driver("herald", pool="first"),
        driver("counting_listener"),
    ],
    "two_nodes_idle": [driver("idle"), driver("with_child", pool="first")],
}
RESTARTED = {"suicide": "suicide", "mortal": "mortal", "with_child": "idle"}
IMPATIENT = ("frozen", "stuck", "stubborn", "mortal")
WITH_QUEUE = ("queue", "mortal_stage", "broken_stage", "stalled_stage", "two_nodes")


def main(name: str, run_dir: Path, session_root: Path) -> int:
    topology = Topology.from_environment()

    def say(**event: Any) -> None:
        # One write a line: under torchrun several nodes share the pipe, unbuffered.
        sys.stdout.write(json.dumps({"node": topology.node, **event}) + "\n")
        sys.stdout.flush()

    graph = Graph.of(STAGES[name])
    plans = plan(graph, [_ALL, _FIRST], topology.num_nodes)
    settings: dict[str, WorkerSettings] = {}
    if name in RESTARTED:
        settings[RESTARTED[name]] = WorkerSettings(restart="always")
    if name == "broken_stage":
        settings["maths"] = WorkerSettings(restart="never")
    controller = NodeController(
        topology,
        graph,
        plans,
        ControllerSettings(
            run_dir=run_dir,
            session_root=session_root,
            limits=_LIMITS if name in IMPATIENT else _PATIENT,
            queue=QueueSettings(batch_rows=8, max_staleness=1, lease_s=2.0) if name in WITH_QUEUE else None,
            peer_s=5.0,
            preload=tuple(os.environ.get("CONTROLLERS_TEST_PRELOAD", "").split()),
        ),
        settings,
        Observers(
            on_report=lambda worker, metrics, step: say(report=metrics, worker=worker, step=step),
            on_worker=lambda worker, state, text: say(worker=worker, state=state.value, text=text),
            on_announcement=lambda topic, payload: say(topic=topic, payload=payload),
            on_stall=lambda worker, text: say(worker=worker, stall=text),
            on_end=lambda code, reason: say(end=code, reason=reason),
        ),
    )
    return controller.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
