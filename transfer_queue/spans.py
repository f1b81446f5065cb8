"""Rows of a group by their indices: as ranges where they travel, as bits of an integer where they are counted.

A group's rows mostly do things together, so neither the wire nor the ledger goes through them one by one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import msgspec

MAX_GROUP_ROWS = 1 << 20
KNOWN_BITS = 512
"""Groups are mostly of a few sizes, and their rows mostly do things together: the same questions come again."""


class RowKey(msgspec.Struct, frozen=True, array_like=True, order=True):
    """Names one row. `attempt` counts how often its group was reserved anew."""

    partition: str
    group: int
    index: int
    attempt: int = 0


class Span(msgspec.Struct, frozen=True, array_like=True):
    """Rows `first` to `end` (which is not one of them) of one attempt at a group."""

    partition: str
    group: int
    attempt: int
    first: int
    end: int

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.end <= MAX_GROUP_ROWS:
            raise ValueError(f"rows {self.first} to {self.end} of a group; from 0 to at most {MAX_GROUP_ROWS}")

    @property
    def identity(self) -> tuple[str, int, int]:
        return (self.partition, self.group, self.attempt)

    def __len__(self) -> int:
        return self.end - self.first

    @property
    def bits(self) -> int:
        return ((1 << (self.end - self.first)) - 1) << self.first

    @property
    def keys(self) -> Iterator[RowKey]:
        return (RowKey(self.partition, self.group, index, self.attempt) for index in range(self.first, self.end))


class Keys(Sequence[RowKey]):
    """Row keys, kept as spans until somebody looks at one."""

    __slots__ = ("_keys", "_num_keys", "spans")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, spans: Iterable[Span]) -> None:
        self.spans = tuple(spans)
        self._num_keys = sum(map(len, self.spans))
        self._keys: list[RowKey] | None = None

    @property
    def all(self) -> list[RowKey]:
        if self._keys is None:
            self._keys = keys_of(self.spans)
        return self._keys

    def __len__(self) -> int:
        return self._num_keys

    def __getitem__(self, index: Any) -> Any:
        return self.all[index]

    def __iter__(self) -> Iterator[RowKey]:
        return iter(self.all)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.all == list(other)

    def __add__(self, other: Iterable[RowKey]) -> list[RowKey]:
        return [*self.all, *other]

    def __repr__(self) -> str:
        return repr(self.all)


def spans_of(keys: Sequence[RowKey]) -> list[Span]:
    """In the order of the keys."""
    if isinstance(keys, Keys):
        return list(keys.spans)
    spans: list[Span] = []
    start: RowKey | None = None
    end = 0
    for key in keys:
        if (
            start is not None
            and key.index == end
            and key.group == start.group
            and key.attempt == start.attempt
            and key.partition == start.partition
        ):
            end += 1
            continue
        if start is not None:
            spans.append(Span(start.partition, start.group, start.attempt, start.index, end))
        start, end = key, key.index + 1
    if start is not None:
        spans.append(Span(start.partition, start.group, start.attempt, start.index, end))
    return spans


def keys_of(spans: Sequence[Span]) -> list[RowKey]:
    return [key for span in spans for key in span.keys]


@lru_cache(KNOWN_BITS)
def bits_between(first: int, end: int) -> int:
    return ((1 << (end - first)) - 1) << first


@lru_cache(KNOWN_BITS)
def ranges(bits: int) -> tuple[tuple[int, int], ...]:
    """(first, end) of each run of ones, lowest first."""
    found = []
    at = 0
    while bits:
        skip = (bits & -bits).bit_length() - 1
        bits >>= skip
        length = (~bits & (bits + 1)).bit_length() - 1
        found.append((at + skip, at + skip + length))
        bits >>= length
        at += skip + length
    return tuple(found)


def lowest(bits: int, count: int) -> int:
    """The `count` lowest ones."""
    kept = 0
    for first, end in ranges(bits):
        if count <= 0:
            break
        kept |= bits_between(first, min(end, first + count))
        count -= end - first
    return kept
