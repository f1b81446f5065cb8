"""From the files of a record to the updates that count: of every update the latest life that finished it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from flowrl.replay.record import RECORD_DIR, Beginning, Consumed, Updated, read_entries
from transfer_queue.rows import Rows

_FILE_NAME = re.compile(r"rank(\d+)\.life(\d+)")


@dataclass(frozen=True)
class Life:
    """One file of a rank. end: the update after its last whole one, or after what a later life left of it."""

    path: Path
    beginning: Beginning
    end: int


@dataclass(frozen=True)
class RecordedUpdate:
    number: int
    batches: list[Rows]
    digests: dict[str, str]


class Lineage:
    """Of one rank. Raises ValueError for a record that does not reach from the start to its end without a gap."""

    def __init__(self, run: Path, rank: int) -> None:
        found = sorted((life, path) for number, life, path in record_files(run) if number == rank)
        if not found:
            raise ValueError(f"run: {str(run)!r} has no record of rank {rank}; run.record was false there")
        self.lives = _surviving([_life(path) for _, path in found])
        self.beginning = self.lives[0].beginning
        sizes = {life.beginning.world_size for life in self.lives}
        if len(sizes) > 1:
            raise ValueError(f"run: {str(run)!r} was trained by {sorted(sizes)} ranks; a replay needs one world size")

    @property
    def steps(self) -> int:
        return self.lives[-1].end

    def updates(self) -> Iterator[RecordedUpdate]:
        """In order, from the first."""
        for life in self.lives:
            batches: list[Rows] = []
            for entry in read_entries(life.path):
                if isinstance(entry, Consumed) and entry.update < life.end:
                    batches.append(entry.parcel.rows())
                elif isinstance(entry, Updated) and entry.update < life.end:
                    yield RecordedUpdate(entry.update, batches, entry.digests)
                    batches = []


def record_files(run: Path) -> list[tuple[int, int, Path]]:
    """(rank, life, path) of each."""
    directory = run / RECORD_DIR
    matches = [(_FILE_NAME.fullmatch(path.name), path) for path in directory.iterdir()] if directory.is_dir() else []
    return [(int(match[1]), int(match[2]), path) for match, path in matches if match]


def _life(path: Path) -> Life:
    entries = read_entries(path)
    beginning = next(entries, None)
    if not isinstance(beginning, Beginning):
        raise ValueError(f"record: {str(path)!r} has no beginning")
    end = beginning.step
    for entry in entries:
        if isinstance(entry, Updated):
            end = entry.update + 1
    return Life(path, beginning, end)


def _surviving(lives: list[Life]) -> list[Life]:
    """A life counts up to where the next one that trained began."""
    trained = [life for life in lives if life.end > life.beginning.step]
    kept: list[Life] = []
    for life in reversed(trained):
        limit = kept[0].beginning.step if kept else life.end
        if life.beginning.step < limit:
            if life.end < limit:
                raise ValueError(f"record: {str(life.path)!r} ends at {life.end}; the next life began at {limit}")
            kept.insert(0, Life(life.path, life.beginning, limit))
    if not kept or kept[0].beginning.step != 0:
        raise ValueError("record: its first update is missing, so there is nothing to begin from")
    return kept
