"""`flowrl simulate`, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowrl.cli.main import main

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "recipes" / "quickstart.yaml")
SMALL = ("train.batch_groups=4", "rollout.group_size=2", "rollout.concurrency=8")


def test_table_compares_bounds_and_policies(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", RECIPE, *SMALL, "--updates", "20", "--bounds", "0,1,none", "--step-s", "0.2"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["bound", "late"], ["0", "wait"], ["1", "wait"], ["1", "drop"], ["none", "wait"],
    ]  # fmt: skip
    assert any(line[3] == "100%" for line in lines[1:])


def test_json_has_one_object_a_line_and_the_bound_holds(capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "--updates",
        "20",
        "--bounds",
        "1,2",
        "--late",
        "wait",
        "--json",
        "--filtered",
        "0.2",
        "--failures",
        "0.02",
    ]
    assert main(["simulate", RECIPE, *SMALL, *given]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["bound"] for line in found] == [1, 2]
    assert all(line["max_lag"] <= line["bound"] for line in found)
    assert all(line["ended"]["tied"] > 0 for line in found)


def test_times_are_those_that_a_run_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every response took 2 s and every update 1 s of work, 0.25 s of it publishing, and engines began with new weights
    0.5 s later; at bound 0 that is one after the other, four groups at a time on one engine."""
    events = []
    for at in range(40):
        key = ["train", at, 0, 0]
        events.append({"t": float(at), "node": 0, "kind": "dispatched", "key": key, "version": 0})
        events.append({"t": at + 2.0, "node": 0, "kind": "sampled", "key": key, "versions": [[0, 5]]})
    for version in range(3):
        events.append({"t": 10.0 * version, "node": 0, "kind": "published", "version": version})
        reserved = {"node": 0, "kind": "reserved", "key": ["train", version, 0, 0], "version": version}
        events += [{"t": 10.0 * version + 0.5, **reserved}, {"t": 10.0 * version + 2.0, **reserved}]
    (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    metrics = {"t": 1.0, "step": 1, "node": 0, "worker": "train.0.0"}
    times = {"timing_s/update_actor": 1.0, "timing_s/update_weights": 0.25, "perf/total_num_tokens": 80}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(metrics | times) + "\n")
    given = ["--run", str(tmp_path), "--updates", "10", "--bounds", "0", "--json"]
    assert main(["simulate", RECIPE, *SMALL, *given]) == 0
    (outcome,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert outcome["seconds"] == pytest.approx(10 * (2.0 + 1.0) + 9 * 0.5)
    assert outcome["rows_s"] == pytest.approx(8 / 3.5, rel=0.03)


def test_trials_hold_the_queue_to_its_promises(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--trials", "2", "--seed", "7", "--updates", "20"]) == 0
    assert capsys.readouterr().out.startswith("2 settings, 40 updates, ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "recipe: missing"),
        ([RECIPE, "--bounds", "1,two"], "bounds: '1,two'"),
        ([RECIPE, "--late", "never"], "late: 'never'"),
        ([RECIPE, "--sigma", "9"], "sigma: 9.0"),
        ([RECIPE, "--updates", "0"], "updates: 0; must be at least 1"),
        ([RECIPE, "--run", "/nowhere"], "/nowhere"),
    ],
)
def test_mistake_is_refused_by_name(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", *arguments]) == 2
    assert words in capsys.readouterr().err
