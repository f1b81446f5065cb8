"""Reads `events.jsonl` and the segments that came before it: one JSON object a line, appended by many processes, so in
no strict order of time.

Only what stands in the log: no import of the code whose acts it records.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec

CHUNK_BYTES = 16 << 20

Key = tuple[str, int, int, int]


class Event(msgspec.Struct, frozen=True, gc=False):
    """kind: reserved, dispatched (version), sampled (versions: [[version, tokens], …]), taken (update), trained
    (update), dropped (reason), lost, published (version), resumed (version, life: what the log tells so far of updates
    from that version on is undone), device (worker, devices, has: whether it has them from now on; held_mb, kept_mb:
    its memory before and after it gave them on). key: [partition, group, index, attempt]. t: seconds since 1970."""

    kind: str
    t: float = 0.0
    node: int = 0
    key: Key | None = None
    version: int | None = None
    update: int | None = None
    reason: str | None = None
    life: int | None = None
    versions: tuple[tuple[int, int], ...] = ()
    worker: str | None = None
    devices: tuple[str, ...] = ()
    has: bool | None = None
    held_mb: float | None = None
    kept_mb: float | None = None


_DECODER = msgspec.json.Decoder(Event)


def read_events(path: Path) -> Iterator[Event]:
    """Every whole line of every segment, the oldest first (`events.1.jsonl`, `events.2.jsonl`, …, then `path`). A last
    line without its end, which a killed writer leaves, is left out.

    Raises ValueError naming file and line if another line is no event.
    """
    for segment in segments(path):
        yield from _read_segment(segment)


def segments(path: Path) -> list[Path]:
    """Those of a log that was rotated, in order; `path`, the newest, last."""
    numbers = [each.suffixes[-2] for each in path.parent.glob(f"{path.stem}.*{path.suffix}")]
    ordered = sorted(int(number[1:]) for number in numbers if number[1:].isdigit())
    return [*(path.with_name(f"{path.stem}.{number}{path.suffix}") for number in ordered), path]


def _read_segment(path: Path) -> Iterator[Event]:
    rest = b""
    lines_before = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            whole, end, rest = (rest + chunk).rpartition(b"\n")
            yield from _decode(path, whole + end, lines_before)
            lines_before += whole.count(b"\n") + len(end)


def _decode(path: Path, lines: bytes, lines_before: int) -> list[Event]:
    try:
        return _DECODER.decode_lines(lines)
    except msgspec.DecodeError:
        return [_decode_line(path, number, line) for number, line in enumerate(lines.splitlines(), lines_before + 1)]


def _decode_line(path: Path, number: int, line: bytes) -> Event:
    try:
        return _DECODER.decode(line)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}:{number}: {error}; every line must be one event") from error
