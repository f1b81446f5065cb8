from __future__ import annotations

import ast
import json
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

import flowrl.report.staleness_check as checked
from flowrl.report.events import Event
from flowrl.report.staleness_check import check, check_run, describe


def key(group: int, index: int = 0, attempt: int = 0) -> list[Any]:
    return ["train", group, index, attempt]


def row(group: int, versions: Iterable[int], update: int, index: int = 0, node: int = 0) -> list[dict[str, Any]]:
    name = {"key": key(group, index), "node": node}
    return [
        {"kind": "reserved", **name, "version": min(versions, default=0)},
        {"kind": "sampled", **name, "versions": [[version, 5] for version in versions]},
        {"kind": "taken", **name, "update": update},
        {"kind": "trained", **name, "update": update},
    ]


def run_of(folder: Path, *events: list[dict[str, Any]], bound: int | None = 2) -> Path:
    lines = [json.dumps({"t": 1.5, "node": 0, **event}) for part in events for event in part]
    (folder / "events.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if bound is not None:
        (folder / "recipe.yaml").write_text(f"staleness:\n  max: {bound}\n")
    return folder


def test_rows_within_the_bound_are_clean_and_counted(tmp_path: Path) -> None:
    dropped = [
        {"kind": "reserved", "key": key(9), "node": 1},
        {"kind": "dropped", "key": key(9), "node": 1, "reason": "late"},
    ]
    lost = [{"kind": "reserved", "key": key(10)}, {"kind": "lost", "key": key(10)}, {"kind": "published", "version": 1}]
    findings = check_run(run_of(tmp_path, row(0, [3], 3), row(1, [1, 2, 3], 3, node=1), dropped, lost))
    assert findings.is_clean
    assert findings.max_staleness == 2
    assert findings.rows_by_staleness == {0: 1, 2: 1}
    assert findings.tokens_by_staleness == {0: 10, 1: 5, 2: 5}
    assert {kind: findings.total(kind) for kind in checked.COUNTED} == {
        "reserved": 4,
        "sampled": 2,
        "taken": 2,
        "trained": 2,
        "dropped": 1,
        "lost": 1,
    }
    assert (findings.counts[0]["taken"], findings.counts[1]["taken"], findings.drops) == (1, 1, {"late": 1})


def test_one_stale_token_is_a_violation_by_the_name_of_its_row(tmp_path: Path) -> None:
    findings = check_run(run_of(tmp_path, row(0, [5], 5), row(7, [2, 4], 5)))
    (violation,) = findings.violations
    assert (violation.key, violation.update) == (("train", 7, 0, 0), 5)
    assert "token of version 2, staleness 3 above the bound 2" in describe(findings)
    assert not findings.is_clean


def test_the_order_of_lines_does_not_matter(tmp_path: Path) -> None:
    events = row(0, [1, 2], 3)
    assert check_run(run_of(tmp_path, events[::-1])).is_clean
    assert check_run(run_of(tmp_path, events[::-1], bound=1)).violations


def test_spans_of_several_sampled_lines_count_together(tmp_path: Path) -> None:
    resumed = {"kind": "sampled", "key": key(0), "versions": [[0, 4]]}
    findings = check_run(run_of(tmp_path, row(0, [3], 3), [resumed]))
    assert findings.max_staleness == 3
    assert len(findings.violations) == 1


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (row(0, [], 3), "nothing says which weights sampled it"),
        (row(0, [4], 3), "a token of version 4, which did not exist yet"),
        (row(0, [3], 3)[3:], "trained, but never taken"),
    ],
)
def test_what_cannot_have_happened_is_a_violation(tmp_path: Path, events: list[dict[str, Any]], said: str) -> None:
    (violation,) = check_run(run_of(tmp_path, events)).violations
    assert said in str(violation)


def test_a_row_trained_twice_and_a_group_split_over_updates_are_found(tmp_path: Path) -> None:
    twice, split = row(0, [3], 3), row(1, [3], 3, index=0) + row(1, [3], 4, index=1)
    findings = check_run(run_of(tmp_path, twice, twice[3:], split))
    assert findings.trained_twice == [("train", 0, 0, 0)]
    assert findings.split_groups == [("train", 1, 0)]
    assert not findings.violations
    assert not findings.is_clean


def test_without_a_bound_staleness_is_told_and_not_judged(tmp_path: Path) -> None:
    findings = check_run(run_of(tmp_path, row(0, [0], 50), bound=None))
    assert (findings.bound, findings.max_staleness, findings.is_clean) == (None, 50, True)
    assert check_run(tmp_path, bound=49).violations


def test_the_last_line_may_be_cut_off_but_no_other(tmp_path: Path) -> None:
    path = run_of(tmp_path, row(0, [3], 3)) / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"kind": "tak')
    assert check_run(tmp_path).is_clean
    path.write_bytes(whole + b'{"kind": "tak\n' + whole)
    with pytest.raises(ValueError, match=r"events\.jsonl:5: .*every line must be one event"):
        check_run(tmp_path)


def test_the_command_says_by_its_exit_code_what_it_found(tmp_path: Path) -> None:
    def command(*arguments: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "flowrl.report.staleness_check", *arguments]
        return subprocess.run(line, capture_output=True, text=True, timeout=60)

    run_of(tmp_path, row(0, [1], 3))
    clean, broken, nothing = command(str(tmp_path)), command(str(tmp_path), "--max", "1"), command(str(tmp_path / "x"))
    assert (clean.returncode, broken.returncode, nothing.returncode) == (0, 1, 2)
    assert "violations: 0" in clean.stdout
    assert "violations: 1" in broken.stdout
    assert "has no events.jsonl" in nothing.stderr


def test_the_checker_imports_nothing_that_keeps_the_bound() -> None:
    code = "import sys, flowrl.report.staleness_check; print(sorted(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    modules = {name.split(".")[0] for name in ast.literal_eval(said)}
    assert not modules & {"transfer_queue", "controllers", "torch"}


def test_a_log_of_ten_megabytes_takes_a_second_or_so(tmp_path: Path) -> None:
    line = (
        '{{"t":1763683000.123,"node":0,"kind":"sampled","key":["train",{0},0,0],"versions":[[{1},9]]}}\n'
        '{{"t":1763683000.123,"node":0,"kind":"taken","key":["train",{0},0,0],"update":{1}}}\n'
    )
    (tmp_path / "events.jsonl").write_text("".join(line.format(group, group // 256) for group in range(60_000)))
    assert (tmp_path / "events.jsonl").stat().st_size > 9e6
    start = time.monotonic()
    assert check_run(tmp_path).total("taken") == 60_000
    assert time.monotonic() - start < 3


def test_updates_that_a_later_life_went_back_behind_count_nowhere() -> None:
    rows = [("train", group, 0, 0) for group in range(3)]
    again = ("train", 1, 0, 1000)
    log = [
        *(Event(kind="sampled", key=key, versions=((0, 2),)) for key in rows),
        Event(kind="taken", key=rows[0], update=0),
        Event(kind="trained", key=rows[0], update=0),
        Event(kind="taken", key=rows[1], update=1),
        Event(kind="trained", key=rows[1], update=1),
        Event(kind="resumed", life=1, version=1),
        Event(kind="sampled", key=again, versions=((1, 2),)),
        Event(kind="taken", key=again, update=1),
        Event(kind="trained", key=again, update=1),
    ]
    findings = check(log, bound=0)
    assert findings.is_clean and (findings.lives, findings.undone) == (2, 1)
    assert findings.rows_by_staleness == {0: 2}
    in_one_life = check([event for event in log if event.kind != "resumed"], bound=0)
    assert [violation.key for violation in in_one_life.violations] == [rows[1]]
    assert in_one_life.repeated == [("train", 1, 0)]
