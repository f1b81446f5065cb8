"""The run's event log: JSON objects, one a line, appended by many processes to one file.

Whole lines only, in single appending writes, so that the lines of different processes never mix. When the file is full,
whoever notices first renames it `events.1.jsonl`, the next one `events.2.jsonl`, and so on: `events.jsonl` is always
the newest segment. What the kinds mean is their writers' matter.
"""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from transfer_queue.rows import RowKey

_FLUSH_S = 0.2
_FLUSH_BYTES = 64 * 1024
MAX_BYTES = 1 << 30


class EventLog:
    """A context manager; usable from any thread. Lines reach the file within 0.2 s, or as soon as 64 KiB wait.
    max_bytes: at which a segment is closed; it may grow beyond by what its writers hold at that moment."""

    def __init__(self, path: Path, node: int, max_bytes: int = MAX_BYTES) -> None:
        self._path = path
        self._node = node
        self._max_bytes = max_bytes
        self._fd = self._open()
        self._encode = msgspec.json.Encoder().encode
        self._buffer = bytearray()
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)
        self._thread.start()

    def write(self, kind: str, key: RowKey | None = None, **fields: Any) -> None:
        """`key` is written as [partition, group, index, attempt]."""
        event: dict[str, Any] = {"t": time.time(), "node": self._node, "kind": kind}
        if key is not None:
            event["key"] = key
        event.update(fields)
        line = self._encode(event) + b"\n"
        with self._changed:
            assert not self._is_closed, "the event log is closed"
            self._buffer += line
            if len(self._buffer) == len(line):
                self._changed.notify()
            elif len(self._buffer) >= _FLUSH_BYTES:
                self._flush()

    def flush(self) -> None:
        """What has been written so far is in the file when this returns, and survives this process."""
        with self._changed:
            self._flush()

    def close(self) -> None:
        """Idempotent."""
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        os.close(self._fd)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        """Sleeps until there is a first line, then lets others gather behind it."""
        with self._changed:
            while not self._is_closed:
                self._changed.wait_for(lambda: self._buffer or self._is_closed)
                self._changed.wait_for(lambda: self._is_closed, timeout=_FLUSH_S)
                self._flush()

    def _flush(self) -> None:
        if self._buffer:
            if os.fstat(self._fd).st_size >= self._max_bytes:
                self._move_on()
            written = os.write(self._fd, self._buffer)
            assert written == len(self._buffer), f"event log: {written} of {len(self._buffer)} bytes written"
            self._buffer.clear()

    def _move_on(self) -> None:
        """To the newest segment, which this process begins if no other has. One process at a time, by a lock on the
        directory; a process that has not noticed yet still writes whole lines to the segment that it has."""
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX)
            try:
                is_newest = os.path.samestat(os.stat(self._path), os.fstat(self._fd))
            except FileNotFoundError:  # somebody moved the log away
                is_newest = False
            if is_newest:
                self._path.rename(next_segment(self._path))
            os.close(self._fd)
            self._fd = self._open()
        finally:
            os.close(directory)

    def _open(self) -> int:
        return os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)


def next_segment(path: Path) -> Path:
    """Where the newest segment goes when it is full: the first free of events.1.jsonl, events.2.jsonl, …"""
    number = 1
    while (segment := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    return segment
