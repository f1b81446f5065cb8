"""Copies rows out of the shard's segments: how a consumer on its node gets them.

map the segments that the shard names -> copy the rows out -> look whether a generation has moved meanwhile
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from transfer_queue import frames, wire
from transfer_queue.buffers import Buffers
from transfer_queue.errors import WireError
from transfer_queue.rows import Column, concatenate
from transfer_queue.segments import Segment, SharedSpace
from transfer_queue.writer import view

MAPPED_BYTES = 64 << 20
"""Of segments that stay mapped between two takes."""


class SegmentReader:
    def __init__(self, space: SharedSpace) -> None:
        self._space = space
        self._mapped: dict[str, Segment] = {}
        self._mapped_bytes = 0
        self._buffers = Buffers()

    def read(self, reply: wire.Delivered) -> dict[str, Column] | None:
        """The columns of a delivery; None if the shard has taken back a row's memory meanwhile."""
        try:
            segments = [self._segment(placed.segment) for placed in reply.placed]
        except WireError:
            return None
        try:
            columns: dict[str, Column] | None = _copy(segments, reply, self._buffers)
        except (WireError, ValueError):  # offsets that were being overwritten
            columns = None
        is_whole = all(
            segment.generation == placed.generation for segment, placed in zip(segments, reply.placed, strict=True)
        )
        assert columns is not None or not is_whole, f"the shard misplaced {reply.placed}"
        self._trim()
        return columns if is_whole else None

    def _segment(self, name: str) -> Segment:
        """Those used last are last."""
        segment = self._mapped.pop(name, None)
        if segment is None:
            segment = self._space.open(name, is_reader=True)
            self._mapped_bytes += segment.capacity
        self._mapped[name] = segment
        return segment

    def _trim(self) -> None:
        while self._mapped_bytes > MAPPED_BYTES:
            name = next(iter(self._mapped))
            self._mapped_bytes -= self._mapped.pop(name).capacity


def _copy(segments: Sequence[Segment], reply: wire.Delivered, buffers: Buffers) -> dict[str, Column]:
    parcels = [
        view(segment, placed.columns, placed.num_rows) for segment, placed in zip(segments, reply.placed, strict=True)
    ]
    dtypes = {header.name: frames.DTYPES[header.dtype] for header in reply.columns}
    parts = {}
    for layout in reply.layouts:
        runs = np.frombuffer(layout.runs, frames.RUN).reshape(-1, 3).tolist()
        for name in layout.names:
            parts[name] = [
                Column.empty_rows(end - first, dtypes[name]) if at < 0 else parcels[at][name].slice(first, end)
                for at, first, end in runs
            ]
    return concatenate(parts, buffers.take, is_wide=True)
