"""Small puts that go together: one message, one place in memory, one answer.

Parts whose columns are alike are joined. A part that the shard refuses is found by sending the parts one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transfer_queue.errors import QueueError
from transfer_queue.rows import Column, RowKey, concatenate

GATHER_BYTES = 512 << 10
"""A put above this goes alone, and what has gathered goes when it comes to that."""
GATHER_ROWS = 256


@dataclass(frozen=True)
class Part:
    """What one caller puts. versions: empty, or one a row."""

    keys: Sequence[RowKey]
    columns: Mapping[str, Column]
    versions: Sequence[int]

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if len(column) != len(self.keys):
                raise ValueError(f"column {name!r}: {len(column)} rows for {len(self.keys)} keys")
        if self.versions and len(self.versions) != len(self.keys):
            raise ValueError(f"versions: {len(self.versions)} for {len(self.keys)} rows; one a row")

    @property
    def num_bytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    @property
    def kind(self) -> tuple[object, ...]:
        """Parts of one kind can be joined."""
        return (bool(self.versions), *((name, column.values.dtype.str) for name, column in self.columns.items()))

    def select(self, positions: Sequence[int]) -> Part:
        if len(positions) == len(self.keys):
            return self
        return Part(
            [self.keys[position] for position in positions],
            {name: column.select(positions) for name, column in self.columns.items()},
            [self.versions[position] for position in positions] if self.versions else (),
        )


def join(parts: Sequence[Part]) -> Part:
    """One part with the rows of all, which must be of one kind."""
    if len(parts) == 1:
        return parts[0]
    return Part(
        [key for part in parts for key in part.keys],
        concatenate({name: [part.columns[name] for part in parts] for name in parts[0].columns}),
        [version for part in parts for version in part.versions],
    )


def batches(parts: Sequence[Part]) -> list[list[int]]:
    """Positions of the parts that go together: neighbours of one kind, up to the limits."""
    together: list[list[int]] = []
    num_bytes = num_rows = 0
    for position, part in enumerate(parts):
        num_bytes += part.num_bytes
        num_rows += len(part.keys)
        is_full = num_bytes > GATHER_BYTES or num_rows > GATHER_ROWS
        if not together or is_full or part.kind != parts[together[-1][0]].kind:
            together.append([])
            num_bytes, num_rows = part.num_bytes, len(part.keys)
        together[-1].append(position)
    return together


def part_of(keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] | None) -> Part:
    if versions is not None and len(versions) != len(keys):
        raise ValueError(f"versions: {len(versions)} for {len(keys)} rows; one a row")
    return Part(keys, columns, versions if versions is not None else ())


def count_or_raise(outcomes: Sequence[int | QueueError]) -> int:
    for outcome in outcomes:
        if isinstance(outcome, QueueError):
            raise outcome
    return sum(outcome for outcome in outcomes if isinstance(outcome, int))
