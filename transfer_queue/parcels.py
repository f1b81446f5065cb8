"""A parcel: the columns of one put, where they lie, and which rows of which groups it holds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from transfer_queue import wire
from transfer_queue.heap import Held
from transfer_queue.rows import Array, Column
from transfer_queue.spans import bits_between

GroupId = tuple[str, int, int]


class Parcel:
    """columns, where they lie. starts: bytes before each row, and in all. pieces: which rows of which groups it
    holds."""

    __slots__ = ("columns", "held", "live_bytes", "num_live", "number", "pieces", "places", "starts")

    def __init__(
        self, number: int, held: Held, places: Sequence[wire.ColumnPlace], columns: Mapping[str, Column]
    ) -> None:
        self.number = number
        self.held = held
        self.places = {place.name: place for place in places}
        self.columns = dict(columns)
        self.starts: list[int] = _starts(columns.values()).tolist()
        self.pieces: list[tuple[GroupId, Piece]] = []
        self.live_bytes = 0
        self.num_live = 0

    @property
    def num_bytes(self) -> int:
        return self.starts[-1]

    def bytes_between(self, first: int, end: int) -> int:
        return self.starts[end] - self.starts[first]

    def placed(self, names: Sequence[str]) -> wire.Placed:
        segment, num_rows = self.held.segment, len(self.starts) - 1
        return wire.Placed(segment.name, segment.generation, num_rows, [self.places[name] for name in names])


class Piece(NamedTuple):
    """Rows `first` to `end` of a group lie in the parcel from `position` on."""

    parcel: Parcel
    first: int
    end: int
    position: int

    @property
    def bits(self) -> int:
        return bits_between(self.first, self.end)


def _starts(columns: Iterable[Column]) -> Array:
    """Bytes before each row, and in all. Columns often share their offsets."""
    widths: dict[int, int] = {}
    offsets: dict[int, Array] = {}
    for column in columns:
        at = id(column.offsets)
        offsets[at] = column.offsets
        widths[at] = widths.get(at, 0) + column.values.itemsize
    starts = [offsets[at] * width for at, width in widths.items()]
    return starts[0] if len(starts) == 1 else np.sum(starts, axis=0)
