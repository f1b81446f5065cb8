"""Where payload lies: which segment, which put, which place in it; and when its memory can be used again.

A *parcel* is the columns of one put. Its bytes count against the limit until the last of its rows is done, or until it
is mostly finished: then what is left moves, so that a slow row does not hold on to its batch. Which rows are live,
ready or done is the ledger's business; what lies in a segment, `writer.py`'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from transfer_queue import frames, wire
from transfer_queue.buffers import Buffers
from transfer_queue.errors import QueueError, RowRefused
from transfer_queue.heap import Heap
from transfer_queue.parcels import GroupId, Parcel, Piece
from transfer_queue.rows import Array, Column, concatenate
from transfer_queue.spans import Span, ranges
from transfer_queue.writer import SegmentWriter, Space, view

COMPACT_BELOW = 0.5
"""Of a parcel's bytes: with less than that live, its rows move."""
SHARD_WRITER = 0
LENT_BYTES = 64 << 10
"""Smaller columns are copied on their way in any case."""


class Shelf:
    """What there is of one group. live: the rows that are not freed, as bits."""

    __slots__ = ("live", "pieces")

    def __init__(self) -> None:
        self.live = 0
        self.pieces: list[Piece] = []


class Run(NamedTuple):
    """Rows of a parcel; no parcel for rows without the column."""

    parcel: Parcel | None
    first: int
    end: int


class Whereabouts(NamedTuple):
    columns: list[wire.ColumnHeader]
    placed: list[wire.Placed]
    layouts: list[wire.Layout]


class Storage:
    def __init__(self, space: Space) -> None:
        self.num_bytes = 0
        self.heap = Heap(space)
        self._writer = SegmentWriter(self.heap.space, SHARD_WRITER)
        self.news: list[Parcel] | None = None
        """Parcels that are new, if somebody wants to know."""
        self._numbers = itertools.count()
        self._buffers = Buffers()
        self._shelves: dict[GroupId, Shelf] = {}
        self._dtypes: dict[str, np.dtype] = {}

    def __len__(self) -> int:
        """Rows of which something is there."""
        return sum(shelf.live.bit_count() for shelf in self._shelves.values())

    # Putting

    def open(self, placed: wire.Placed, num_rows: int) -> dict[str, Column]:
        """The columns that a producer on this node has written. Raises WireError or RowRefused."""
        return view(self.heap.see_put(placed.segment).segment, placed.columns, num_rows)

    def end_put(self, placed: wire.Placed) -> None:
        """After `open`, whatever became of it."""
        if placed.segment in self.heap:
            self.heap.settle(self.heap.held(placed.segment))

    def recycled(self, placed: wire.Placed | None) -> list[wire.Recycled]:
        """News for who wrote this put, if it was a producer on this node."""
        return self.heap.recycled(self.heap.held(placed.segment).segment.writer) if placed is not None else []

    def check(self, columns: Mapping[str, Column]) -> None:
        """A column has one dtype, that of its first put."""
        for name, column in columns.items():
            known, dtype = self._dtypes.get(name), column.dtype
            if known is None:
                frames.travelling(name, dtype)
            elif known != dtype:
                frames.travelling(name, dtype)
                raise RowRefused(f"columns: {name!r} is {dtype}; it came as {known} before")

    def store(
        self, rows: Sequence[tuple[Span, int]], columns: Mapping[str, Column], placed: wire.Placed | None = None
    ) -> None:
        """Keeps these rows, of which the first has that position in the columns: where the producer has written them,
        or by writing them. Raises QueueError where there is no room."""
        if not rows:
            return
        if placed is not None:
            parcel = Parcel(next(self._numbers), self.heap.held(placed.segment), placed.columns, columns)
        else:
            num_rows = sum(len(span) for span, _ in rows)
            if num_rows < len(next(iter(columns.values()))):
                columns = {name: _select(column, rows) for name, column in columns.items()}
                rows = _closed_up(rows)
            parcel = self._write(columns)
        self._settle(parcel, rows)

    def _write(self, columns: Mapping[str, Column]) -> Parcel:
        segment, places = self._writer.write(columns)
        held = self.heap.keep(segment)
        held.puts += 1
        return Parcel(next(self._numbers), held, places, view(segment, places, len(next(iter(columns.values())))))

    def _settle(self, parcel: Parcel, rows: Sequence[tuple[Span, int]]) -> None:
        for name, column in parcel.columns.items():
            if name not in self._dtypes:
                self._dtypes[name] = column.dtype
        for span, position in rows:
            group, first, end = span.identity, span.first, span.end
            shelf = self._shelves.get(group)
            if shelf is None:
                shelf = self._shelves[group] = Shelf()
            piece = Piece(parcel, first, end, position)
            shelf.pieces.append(piece)
            shelf.live |= span.bits
            parcel.pieces.append((group, piece))
            parcel.num_live += end - first
            parcel.live_bytes += parcel.bytes_between(position, position + end - first)
        parcel.held.num_parcels += 1
        self.num_bytes += parcel.num_bytes
        if self.news is not None:
            self.news.append(parcel)

    # Coming back

    def shelf(self, group: GroupId) -> Shelf | None:
        return self._shelves.get(group)

    def parcels(self) -> Iterator[Parcel]:
        """One as often as it has pieces."""
        return (piece.parcel for shelf in self._shelves.values() for piece in shelf.pieces)

    def reopen(self, number: int, segment: str, num_rows: int, places: Sequence[wire.ColumnPlace]) -> Parcel:
        """One of an earlier life, as yet without rows. Raises WireError if it is not all there."""
        held = self.heap.reopen(segment)
        return Parcel(number, held, places, view(held.segment, places, num_rows))

    def put_back(self, group: GroupId, live: int, pieces: Sequence[tuple[Parcel, int, int, int]]) -> None:
        """Rows that lie in parcels of an earlier life."""
        if not live or not pieces:
            return
        shelf = self._shelves[group] = Shelf()
        shelf.live = live
        for parcel, first, end, position in pieces:
            piece = Piece(parcel, first, end, position)
            shelf.pieces.append(piece)
            if not parcel.pieces:
                parcel.held.num_parcels += 1
                self.num_bytes += parcel.num_bytes
            parcel.pieces.append((group, piece))
            for start, stop in ranges(live & piece.bits):
                at = position + start - first
                parcel.num_live += stop - start
                parcel.live_bytes += parcel.bytes_between(at, at + stop - start)
            for name, column in parcel.columns.items():
                self._dtypes.setdefault(name, column.dtype)

    def end_recovery(self, next_parcel: int) -> None:
        """What no row lies in goes."""
        self._numbers = itertools.count(next_parcel)
        self.heap.sweep()

    # Reading

    def holds(self, span: Span, columns: Mapping[str, Column]) -> bool:
        """Whether the rows have exactly these contents."""
        for name, column in columns.items():
            runs = self._runs([span], name)
            if any(run.parcel is None for run in runs) or name not in self._dtypes:
                return False
            mine = Column.concatenate([_part(run, name, self._dtypes[name]) for run in runs])
            if not (np.array_equal(mine.offsets, column.offsets) and _same(mine.values, column.values)):
                return False
        return True

    def gather(self, spans: Sequence[Span], names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Column]:
        """The columns of these rows, in their order, to be sent. Runs of neighbours are copied as one; where there is
        but one and it is large, it is lent instead. Optional columns that no row has are left out."""
        lent: dict[str, Column] = {}
        parts: dict[str, list[Column]] = {}
        for group, runs in self._layouts(spans, names, optional):
            for name in group:
                found = [_part(run, name, self._dtypes[name]) for run in runs]
                if len(found) == 1 and runs[0].parcel is not None and found[0].nbytes >= LENT_BYTES:
                    values = runs[0].parcel.held.segment.lend(found[0].values)
                    lent[name] = Column.checked(values, found[0].offsets.copy(), found[0].dtype)
                else:
                    parts[name] = found
        return {**lent, **concatenate(parts, self._buffers.take)}

    def locate(self, spans: Sequence[Span], names: Sequence[str], optional: Sequence[str] = ()) -> Whereabouts:
        """Where these rows lie, for a reader on this node."""
        found = Whereabouts([], [], [])
        for group, runs in self._layouts(spans, names, optional):
            indices: dict[int, int] = {}
            table = []
            for run in runs:
                index = -1
                if run.parcel is not None:
                    if id(run.parcel) not in indices:
                        indices[id(run.parcel)] = len(found.placed)
                        found.placed.append(run.parcel.placed(group))
                    index = indices[id(run.parcel)]
                table.append((index, run.first, run.end))
            found.columns.extend(wire.ColumnHeader(name, frames.name_of(self._dtypes[name]), False) for name in group)
            found.layouts.append(wire.Layout(group, np.array(table, frames.RUN).tobytes()))
        return found

    def length_of(self, spans: Sequence[Span], name: str) -> int:
        """Sum of the rows' lengths in this column."""
        total = 0
        for parcel, first, end in self._runs(spans, name):
            if parcel is not None:
                offsets = parcel.columns[name].offsets
                total += int(offsets[end] - offsets[first])
        return total

    def _layouts(
        self, spans: Sequence[Span], names: Sequence[str], optional: Sequence[str]
    ) -> list[tuple[list[str], list[Run]]]:
        """Names whose rows lie in the same places, with those."""
        layouts: list[tuple[list[str], list[Run]]] = []
        for name in (*names, *optional):
            if name not in self._dtypes:
                continue
            for group, runs in layouts:
                if all(run.parcel is not None and name in run.parcel.columns for run in runs):
                    group.append(name)
                    break
            else:
                runs = self._runs(spans, name)
                if name in names or any(run.parcel is not None for run in runs):
                    layouts.append(([name], runs))
        return layouts

    def _runs(self, spans: Sequence[Span], name: str) -> list[Run]:
        """In the order of the rows; neighbours in one."""
        runs: list[Run] = []
        last, start, stop = None, 0, -1
        for span in spans:
            for parcel, first, end in _of_shelf(self._shelves[span.identity], span, name):
                if parcel is not last or first != stop:
                    if stop >= 0:
                        runs.append(Run(last, start, stop))
                    last, start = parcel, first
                stop = end
        if stop >= 0:
            runs.append(Run(last, start, stop))
        return runs

    # Freeing

    def free(self, rows: Sequence[tuple[GroupId, int]]) -> None:
        """These, as bits, are not needed any more. Those of which nothing is there are passed over."""
        shrunk: dict[int, Parcel] = {}
        for group, bits in rows:
            shelf = self._shelves.get(group)
            if shelf is None:
                continue
            bits &= shelf.live
            shelf.live ^= bits
            if not shelf.live:
                del self._shelves[group]
            for parcel in _shrink(shelf, bits):
                shrunk[id(parcel)] = parcel
        for parcel in shrunk.values():
            if not parcel.num_live:
                self._release(parcel)
            elif parcel.live_bytes < COMPACT_BELOW * parcel.num_bytes:
                self._compact(parcel)

    def _release(self, parcel: Parcel) -> None:
        self.num_bytes -= parcel.num_bytes
        parcel.held.num_parcels -= 1
        self.heap.settle(parcel.held)
        self._writer.recycle(self.heap.recycled(SHARD_WRITER))

    def _compact(self, parcel: Parcel) -> None:
        """Writes what is left of the parcel anew. Without room for that it stays."""
        left = [
            (Span(*group, first, end), piece.position + first - piece.first)
            for group, piece in parcel.pieces
            if group in self._shelves
            for first, end in ranges(self._shelves[group].live & piece.bits)
        ]
        try:
            new = self._write({name: _select(column, left) for name, column in parcel.columns.items()})
        except QueueError:
            return
        for group in {span.identity for span, _ in left}:
            shelf = self._shelves[group]
            shelf.pieces = [piece for piece in shelf.pieces if piece.parcel is not parcel]
        self._settle(new, _closed_up(left))
        self._release(parcel)


def _of_shelf(shelf: Shelf, span: Span, name: str) -> Iterable[tuple[Parcel | None, int, int]]:
    """Where these rows of one group lie: (parcel or None, first, end)."""
    if len(shelf.pieces) == 1:  # as a rule
        parcel, first, end, position = shelf.pieces[0]
        if first <= span.first and span.end <= end and name in parcel.columns:
            position -= first
            return ((parcel, position + span.first, position + span.end),)
    return _over_pieces(shelf, span, name)


def _over_pieces(shelf: Shelf, span: Span, name: str) -> Iterator[Run]:
    at = span.first
    while at < span.end:
        holders = [piece for piece in shelf.pieces if piece.end > at and name in piece.parcel.columns]
        piece = min(holders, key=lambda piece: piece.first, default=None)
        if piece is None or piece.first >= span.end:
            yield Run(None, at, span.end)
            return
        if piece.first > at:
            yield Run(None, at, piece.first)
            at = piece.first
        end = min(piece.end, span.end)
        position = piece.position + at - piece.first
        yield Run(piece.parcel, position, position + end - at)
        at = end


def _shrink(shelf: Shelf, bits: int) -> Iterator[Parcel]:
    """Takes the rows out of the parcels' counts."""
    for piece in shelf.pieces:
        parcel, start, _, position = piece
        hit = bits & piece.bits
        if hit:
            parcel.num_live -= hit.bit_count()
            for first, end in ranges(hit):
                at = position + first - start
                parcel.live_bytes -= parcel.bytes_between(at, at + end - first)
            yield parcel


def _same(one: Array, other: Array) -> bool:
    """Byte for byte; integers of one value are the same in whatever they are kept."""
    if one.dtype != other.dtype:
        return np.array_equal(one, other)
    return one.tobytes() == other.tobytes()


def _select(column: Column, rows: Sequence[tuple[Span, int]]) -> Column:
    return Column.concatenate([column.slice(position, position + len(span)) for span, position in rows])


def _closed_up(rows: Sequence[tuple[Span, int]]) -> list[tuple[Span, int]]:
    """The same rows, one after the other."""
    closed_up = []
    position = 0
    for span, _ in rows:
        closed_up.append((span, position))
        position += len(span)
    return closed_up


def _part(run: Run, name: str, dtype: np.dtype) -> Column:
    parcel, first, end = run
    return Column.empty_rows(end - first, dtype) if parcel is None else parcel.columns[name].slice(first, end)
