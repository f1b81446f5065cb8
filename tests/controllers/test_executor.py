"""A graph of drivers and mapped stages over the real queue, all in processes of their own."""

from __future__ import annotations

import itertools
import json
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from controllers.executor import run_stages
from tests.controllers.conftest import Run
from transfer_queue.client import QueueClient
from transfer_queue.clock import LocalClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.rows import Column, Rows
from transfer_queue.server import QueueServer
from transfer_queue.staleness import Accounts

Start = Callable[..., Run]
release = threading.Event()


def test_rows_stream_through_mapped_stages_to_the_sink(start: Start) -> None:
    run = start("queue")
    assert run.finish() == 0, run.describe()
    assert [event["payload"]["version"] for event in run.events if event.get("topic") == "published"] == [1, 2, 3, 4, 5]
    assert "closed" in (run.run_dir / "logs" / "maths.0.0.log").read_text()
    logged = [json.loads(line) for line in (run.run_dir / "events.jsonl").read_text().splitlines()]
    taken = [event for event in logged if event["kind"] == "taken"]
    assert Counter(event["update"] for event in taken) == dict.fromkeys(range(5), 8)
    assert len({tuple(event["key"]) for event in taken}) == 40, "a row is trained once"
    assert most_outstanding(logged) <= 16, "at staleness 1, two updates of 8 rows"
    run.assert_nothing_left()


def test_rows_of_a_killed_stage_are_done_by_its_successor(start: Start) -> None:
    run = start("mortal_stage")
    assert run.finish() == 0, run.describe()
    assert run.texts("maths.0.0", "down") == ["signal SIGKILL; restart 1 in 0.1 s"]
    logged = [json.loads(line) for line in (run.run_dir / "events.jsonl").read_text().splitlines()]
    assert len({tuple(event["key"]) for event in logged if event["kind"] == "taken"}) == 40
    run.assert_nothing_left()


def most_outstanding(logged: list[dict[str, Any]]) -> int:
    counts = itertools.accumulate({"reserved": 1, "taken": -1}.get(event["kind"], 0) for event in logged)
    return max(counts)


def test_a_call_that_does_not_return_is_named_with_its_stack_and_the_run_goes_on_when_it_does(start: Start) -> None:
    run = start("stalled_stage")
    assert run.finish() == 0, run.describe()
    told = [event["stall"] for event in run.events if event.get("worker") == "maths.0.0" and "stall" in event]
    log = run.run_dir / "logs" / "maths.0.0.log"
    assert len(told) == 1, "once"
    assert told[0].startswith("has waited for multiply.process to return, with ")
    assert told[0].endswith(f"; its stacks are in {log}")
    assert "scenario_workers.py" in log.read_text() and "in process" in log.read_text()
    run.assert_nothing_left()


def test_failing_stage_is_named(start: Start) -> None:
    run = start("broken_stage")
    assert run.finish() == 1
    assert (
        "worker maths.0.0 died: RuntimeError: stage 'multiply': ArithmeticError('cannot multiply today')"
        in (run.end["reason"])
    )
    run.assert_nothing_left()


class Judge:
    """Scores a row by its length; one row waits until it is let go."""

    concurrency = 2
    max_rows = 1

    def __init__(self, context: Any, settings: Any) -> None: ...

    def process(self, rows: Rows) -> dict[str, Column]:
        if int(rows["length"].values[0]) == 0:
            assert release.wait(20)
        return {"score": Column.scalars(rows["length"].values, "float32")}


def test_a_row_that_takes_long_keeps_none_waiting_not_even_of_its_own_group(tmp_path: Path) -> None:
    """Seven rows of a group are scored while the first is not; those of a slow sample's group while it is sampled."""
    consumers = {"judge": ConsumerSpec(columns=("length",)), "reader": ConsumerSpec(columns=("length", "score"))}
    config = QueueConfig(endpoint=f"ipc://{tmp_path}/queue", consumers=consumers, byte_limit=1 << 20)
    server = QueueServer(config, LocalClock(Accounts(1, 0)))
    serving = threading.Thread(target=server.serve)
    context = SimpleNamespace(
        payload={"stages": [stage_named("judge", f"{__name__}:Judge")]}, queue_endpoints=[config.endpoint],
        queue_secret="", name="stages.0.0", stopping=threading.Event(), ready=lambda: None,
        report=lambda metrics: None, waiting_for=lambda what: nullcontext(),
    )  # fmt: skip
    executor = threading.Thread(target=run_stages, args=(context,))
    serving.start()
    executor.start()
    try:
        with QueueClient(config.endpoint) as client:
            (group,) = client.reserve("rollout", 1, 9)
            client.put(group.keys[:8], {"length": Column.scalars(range(8), "int64")})
            scored: list[float] = []
            while len(scored) < 7:
                rows = client.take("reader", max_rows=8, wait_s=20.0).rows
                assert len(rows), "rows wait for one that takes long"
                scored += rows["score"].values.tolist()
            assert sorted(scored) == [1, 2, 3, 4, 5, 6, 7]
            release.set()
            assert client.take("reader", max_rows=8, wait_s=20.0).rows["score"].values.tolist() == [0.0]
    finally:
        release.set()
        context.stopping.set()
        executor.join()
        server.stop()
        serving.join()
        server.close()


def stage_named(name: str, run: str) -> dict[str, Any]:
    return {"name": name, "run": run, "reads": ["length"], "writes": ["score"]}
