"""Puts columns into segments: a producer on the shard's node does so by itself, the shard for everybody else.

Small puts share segments of `SEGMENT_BYTES`, filled one after the other, front to back; a large put has a segment of
its own size. Segments whose contents are all finished come back from the shard (`Recycled`) and are
filled again, so that their memory is made once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transfer_queue import frames, wire
from transfer_queue.errors import RowRefused, WireError
from transfer_queue.narrow import narrowest
from transfer_queue.rows import Array, Column
from transfer_queue.segments import HEADER_BYTES, PrivateSpace, Segment, SharedSpace

SEGMENT_BYTES = 4 << 20
SHARED_PUT_BYTES = 1 << 20
MAPPED_BYTES = 64 << 20
_ALIGNMENT = 64
_ROUND_BYTES = 64 << 10
_OVERSIZE = 1.2

Space = SharedSpace | PrivateSpace


class _Page:
    """A segment that is being filled, up to `end`."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self.end = HEADER_BYTES

    def append(self, array: Array, dtype: np.dtype) -> int:
        """Where it begins."""
        at = self.end
        end = at + len(array) * dtype.itemsize
        if len(array):
            self.segment.bytes[at:end].view(dtype)[:] = array
        self.end = _aligned(end)
        return at


class SegmentWriter:
    """`number` is unique among the writers of a shard."""

    def __init__(self, space: Space, number: int) -> None:
        self._space = space
        self._number = number
        self._made = 0
        self._open: _Page | None = None
        self._idle: list[Segment] = []
        self._filled: dict[str, Segment] = {}
        self._puts: dict[str, int] = {}

    def write(self, columns: Mapping[str, Column]) -> tuple[Segment, list[wire.ColumnPlace]]:
        """Copies the columns into a segment; where they are now. Raises QueueError where there is no room."""
        flat = [
            (name, column, frames.travelling(name, column.dtype), narrowest(column), frames.offsets_to_send(column))
            for name, column in columns.items()
        ]
        page = self._page_for(
            sum(
                _aligned(len(column.values) * kept.itemsize) + _aligned(offsets.nbytes)
                for _, column, _, kept, offsets in flat
            )
        )
        places = []
        offsets_at, last = 0, None
        for name, column, dtype, kept, offsets in flat:
            values_at = page.append(column.values, kept.newbyteorder("<"))
            if offsets is not last:  # columns of equal lengths often share them
                offsets_at = page.append(offsets, frames.OFFSETS) if len(offsets) else 0
                last = offsets
            narrow = frames.name_if_narrow(kept, dtype)
            places.append(
                wire.ColumnPlace(name, frames.name_of(dtype), len(column.values), values_at, offsets_at, narrow)
            )
        name = page.segment.name
        self._puts[name] = self._puts.get(name, 0) + 1
        if page is not self._open:
            self._keep(page.segment)
        return page.segment, places

    def recycle(self, segments: Sequence[wire.Recycled]) -> None:
        """The shard needs nothing of these any more. One that has been written to since stays as it is."""
        for recycled in segments:
            if recycled.is_removed:
                del self._puts[recycled.name]
                self._filled.pop(recycled.name, None)
            elif self._puts.get(recycled.name) == recycled.puts:
                if self._open is not None and self._open.segment.name == recycled.name:
                    self._open.end = HEADER_BYTES
                else:
                    mapped = self._filled.pop(recycled.name) if recycled.name in self._filled else None
                    self._idle.append(mapped or self._space.open(recycled.name))

    def _keep(self, segment: Segment) -> None:
        """Stays mapped, because mapping it again costs as much as filling it; the oldest goes first."""
        self._filled[segment.name] = segment
        while len(self._filled) > 1 and sum(kept.capacity for kept in self._filled.values()) > MAPPED_BYTES:
            del self._filled[next(iter(self._filled))]

    def _page_for(self, needed: int) -> _Page:
        if needed > SHARED_PUT_BYTES:
            return _Page(self._segment(-(-(needed + HEADER_BYTES) // _ROUND_BYTES) * _ROUND_BYTES))
        if self._open is None or self._open.end + needed > self._open.segment.capacity:
            if self._open is not None:
                self._keep(self._open.segment)
            self._open = _Page(self._segment(SEGMENT_BYTES))
        return self._open

    def _segment(self, capacity: int) -> Segment:
        """An idle one of about this size, the one used last, which may still be in a cache; or a new one."""
        fitting = [segment for segment in reversed(self._idle) if capacity <= segment.capacity <= _OVERSIZE * capacity]
        if fitting:
            best = min(fitting, key=lambda segment: segment.capacity)
            self._idle.remove(best)
            return best
        self._made += 1
        return self._space.create(f"{self._number}.{self._made - 1}", capacity)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def view(segment: Segment, places: Sequence[wire.ColumnPlace], num_rows: int) -> dict[str, Column]:
    """The columns where they lie, after every check. Raises WireError or RowRefused."""
    frames.check_size(len(places), num_rows)
    columns: dict[str, Column] = {}
    checked: dict[tuple[int, int], Array] = {}
    for place in places:
        dtype = frames.DTYPES.get(place.dtype)
        if dtype is None:
            raise RowRefused(f"columns: {place.name!r} is {place.dtype}; what travels is {', '.join(frames.DTYPES)}")
        if place.name in columns:
            raise WireError(f"column {place.name!r}: twice there")
        kept = frames.bytes_of(place.name, place.dtype, place.narrow)
        values = _array(segment, place, place.values_at, place.num_values, kept)
        shape = (place.offsets_at, place.num_values)
        if shape not in checked:
            given = place.offsets_at != 0
            offsets = (
                _array(segment, place, place.offsets_at, num_rows + 1, frames.OFFSETS)
                if given
                else frames.scalar_offsets(num_rows)
            )
            frames.check_offsets(place.name, offsets, place.num_values, num_rows)
            checked[shape] = offsets
        columns[place.name] = Column.checked(values, checked[shape], dtype)
    return columns


def _array(segment: Segment, place: wire.ColumnPlace, at: int, count: int, dtype: np.dtype) -> Array:
    end = at + count * dtype.itemsize
    if not (count >= 0 and at >= HEADER_BYTES and end <= segment.capacity) or at % _ALIGNMENT:
        raise WireError(f"column {place.name!r}: bytes {at} to {end} are not in segment {segment.name!r}")
    return segment.bytes[at:end].view(dtype)
