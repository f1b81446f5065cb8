"""A shard on the client's own node, as far as its memory goes: the client writes and reads the rows by itself."""

from __future__ import annotations

from collections.abc import Mapping

from transfer_queue import wire
from transfer_queue.reader import SegmentReader
from transfer_queue.rows import Column
from transfer_queue.segments import SharedSpace
from transfer_queue.writer import SegmentWriter


class Near:
    """`number` is the client's as one who writes; nobody else has it while this process lives."""

    def __init__(self, space: SharedSpace, number: int) -> None:
        space.enter_writer(number)
        self._space = space
        self._number = number
        self.writer = SegmentWriter(space, number)
        self.reader = SegmentReader(space)

    def write(self, columns: Mapping[str, Column], num_rows: int) -> wire.Placed:
        segment, places = self.writer.write(columns)
        return wire.Placed(segment.name, segment.generation, num_rows, places)

    def close(self) -> None:
        self._space.leave_writer(self._number)
