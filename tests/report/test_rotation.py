"""A log that has grown too large goes on in a new segment; whoever reads it reads them all, in order."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from controllers.eventlog import EventLog
from flowrl.report.events import read_events, segments
from flowrl.report.staleness_check import check_run
from transfer_queue.rows import RowKey

ROOT = Path(__file__).resolve().parents[2]
LINES = 3000
WRITER = f"""
import sys
from pathlib import Path
from controllers.eventlog import EventLog
from transfer_queue.rows import RowKey
with EventLog(Path(sys.argv[1]), int(sys.argv[2]), max_bytes=60_000) as log:
    for number in range({LINES}):
        log.write("dispatched", RowKey("train", number, 0, 0), version=number)
        if number % 50 == 0:
            log.flush()
"""


def test_no_line_of_several_writers_is_lost_torn_or_out_of_order_when_segments_change(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    command = [sys.executable, "-c", WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(node)], env={"PYTHONPATH": str(ROOT)}) for node in range(3)]
    assert [writer.wait(100) for writer in writers] == [0, 0, 0]
    found = segments(path)
    assert len(found) > 5 and found[-1] == path
    assert all(60_000 <= segment.stat().st_size < 100_000 for segment in found[:-1]), "closed when full, not before"
    for node in range(3):
        assert [event.version for event in read_events(path) if event.node == node] == list(range(LINES))


def test_segments_are_read_by_number_not_by_name(tmp_path: Path) -> None:
    for name, version in (("events.10.jsonl", 1), ("events.9.jsonl", 0), ("events.jsonl", 2), ("events.bak.jsonl", 7)):
        (tmp_path / name).write_text(json.dumps({"kind": "published", "version": version}) + "\n")
    assert [event.version for event in read_events(tmp_path / "events.jsonl")] == [0, 1, 2]


def test_a_violation_in_an_old_segment_is_found(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("staleness: {max: 0}\n")
    key = RowKey("train", 0, 0, 0)
    for kind, fields in (("sampled", {"versions": [[0, 3]]}), ("taken", {"update": 2}), ("trained", {"update": 2})):
        with EventLog(tmp_path / "events.jsonl", 0, max_bytes=1) as log:
            log.write(kind, key, **fields)
    assert len(segments(tmp_path / "events.jsonl")) == 3
    findings = check_run(tmp_path)
    assert [violation.update for violation in findings.violations] == [2]


def test_a_log_that_somebody_moved_away_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, 0, max_bytes=1) as log:
        log.write("published", version=0)
        log.flush()
        path.rename(tmp_path / "elsewhere")
        log.write("published", version=1)
        log.flush()
        assert [event.version for event in read_events(path)] == [1]
