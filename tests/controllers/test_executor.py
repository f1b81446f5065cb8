"""A graph of drivers and mapped stages over the real queue, all in processes of their own."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from tests.controllers.conftest import Run

Start = Callable[..., Run]


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


def test_failing_stage_is_named(start: Start) -> None:
    run = start("broken_stage")
    assert run.finish() == 1
    assert (
        "worker maths.0.0 died: RuntimeError: stage 'multiply': ArithmeticError('cannot multiply today')"
        in (run.end["reason"])
    )
    run.assert_nothing_left()
