"""Who had a shared device when, from the event log alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowrl.report.device_turns import describe, main, turns
from flowrl.report.events import Event

PLACE = (0, "cpu:0")


def act(t: float, worker: str, has: bool, **more: float) -> Event:
    return Event(kind="device", t=t, worker=worker, devices=("cpu:0",), has=has, **more)


def test_turns_follow_each_other_and_an_overlap_is_found_in_whatever_order_lines_stand() -> None:
    log = [
        act(3.0, "train", True), act(0.0, "engine", True), act(3.0, "engine", False, held_mb=9.0, kept_mb=2.0),
        act(4.0, "train", False), act(4.0, "engine", True), act(6.0, "engine", False, held_mb=7.0, kept_mb=2.0),
    ]  # fmt: skip
    told = turns(log)[PLACE]
    assert [(turn.worker, turn.seconds) for turn in told.turns] == [("engine", 3.0), ("train", 1.0), ("engine", 2.0)]
    assert told.overlaps == [] and told.share("engine") == pytest.approx(5 / 6)
    assert told.memory == {"engine": [(9.0, 2.0), (7.0, 2.0)]}
    assert "memory at their ends, median: 8.0 MiB, then 2.0" in describe({PLACE: told})
    (pair,) = turns([*log, act(5.0, "train", True), act(5.5, "train", False)])[PLACE].overlaps
    assert [turn.worker for turn in pair] == ["engine", "train"]


def test_one_who_died_in_its_turn_has_it_until_its_successor_speaks_or_the_run_begins_anew() -> None:
    died = [act(0.0, "engine", True), act(2.0, "engine", False), act(3.0, "train", True)]
    assert [turn.ends for turn in turns(died)[PLACE].turns] == [2.0, float("inf")]
    assert turns(died)[PLACE].overlaps == []
    anew = [act(0.0, "engine", True), Event(kind="resumed", t=1.0, life=1, version=0), act(2.0, "train", True)]
    assert turns(anew)[PLACE].overlaps == []


def test_the_command_says_by_its_exit_code_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    lines = [
        {"t": t, "node": 0, "kind": "device", "worker": worker, "devices": ["cpu:0"], "has": True}
        for t, worker in ((0, "engine"), (1, "train"))
    ]
    log = tmp_path / "events.jsonl"
    log.write_text("")
    assert main([str(tmp_path)]) == 0 and "no device" in capsys.readouterr().out
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main([str(tmp_path)]) == 1
    assert "node 0, cpu:0: 2 turns, 1 overlaps" in capsys.readouterr().out
