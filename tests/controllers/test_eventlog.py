"""Lines are whole, whoever writes at the same time, and reach the file soon."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from controllers.eventlog import EventLog

_WRITER = """
import sys
from pathlib import Path
from controllers.eventlog import EventLog
from transfer_queue.rows import RowKey
with EventLog(Path(sys.argv[1]), int(sys.argv[2])) as log:
    for number in range(4000):
        log.write("sampled", RowKey("train", number, 0, 1), text="x" * (number % 300))
"""
_LINES = 4000


def test_lines_of_several_processes_never_mix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    root = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, "-c", _WRITER, str(path)]
    writers = [subprocess.Popen([*command, str(node)], env={"PYTHONPATH": root}) for node in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    events = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(events) == 3 * _LINES
    for node in range(3):
        mine = [event for event in events if event["node"] == node]
        assert [event["key"] for event in mine] == [["train", number, 0, 1] for number in range(_LINES)]
    assert set(events[0]) == {"t", "node", "kind", "key", "text"}


def test_line_is_soon_in_the_file_without_another(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, 0) as log:
        log.write("published", version=3)
        began = time.monotonic()
        while not path.read_text():
            assert time.monotonic() - began < 3.0, "the line is still in the buffer"
            time.sleep(0.02)
    assert json.loads(path.read_text())["version"] == 3


def test_closing_twice_is_harmless(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", 0)
    log.write("lost")
    log.close()
    log.close()
    assert path_lines(tmp_path / "events.jsonl") == 1


def path_lines(path: Path) -> int:
    return len(path.read_text().splitlines())
