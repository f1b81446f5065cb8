"""Where payload lies: in this process's memory, one block a column and put, freed when the last of its rows is done.

Owns bytes and nothing else: which rows are live, ready or done is the ledger's business. The shard uses the methods
of `Storage` and nothing behind them, so payload can move elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transfer_queue.errors import RowRefused
from transfer_queue.rows import Column, RowKey


class Parcel:
    """The columns of one put. live: rows that are not freed."""

    __slots__ = ("columns", "live", "num_bytes")

    def __init__(self, columns: Mapping[str, Column], live: int) -> None:
        self.columns = dict(columns)
        self.live = live
        self.num_bytes = sum(column.nbytes + column.offsets.nbytes for column in columns.values())


Place = tuple[Parcel, int]


class Storage:
    def __init__(self) -> None:
        self.num_bytes = 0
        self._places: dict[RowKey, list[Place]] = {}
        self._dtypes: dict[str, np.dtype] = {}

    def __len__(self) -> int:
        return len(self._places)

    def check(self, columns: Mapping[str, Column]) -> None:
        """A column has one dtype, that of its first put."""
        for name, column in columns.items():
            known = self._dtypes.get(name)
            if known is not None and known != column.values.dtype:
                raise RowRefused(f"columns: {name!r} is {column.values.dtype}; it came as {known} before")

    def store(self, keys: Sequence[RowKey], positions: Sequence[int], columns: Mapping[str, Column]) -> None:
        """Keeps the rows at these positions of the put."""
        if not positions:
            return
        parcel = Parcel(columns, len(positions))
        self.num_bytes += parcel.num_bytes
        for name, column in columns.items():
            self._dtypes.setdefault(name, column.values.dtype)
        places = self._places
        for position in positions:
            places.setdefault(keys[position], []).append((parcel, position))

    def holds(self, key: RowKey, columns: Mapping[str, Column], position: int) -> bool:
        """Whether the row has exactly these contents."""
        for name, column in columns.items():
            place = self._place(key, name)
            if place is None or place[0].columns[name][place[1]].tobytes() != column[position].tobytes():
                return False
        return True

    def gather(self, keys: Sequence[RowKey], names: Sequence[str], optional: Sequence[str] = ()) -> dict[str, Column]:
        """The columns of these rows, in their order. Runs of neighbours in one block are copied as one; a batch that is
        one run is not copied at all. Optional columns that no row has are left out."""
        columns = {}
        runs: list[tuple[Parcel, int, int]] | None = None
        of: Parcel | None = None
        for name in (*names, *optional):
            if runs is None or of is None or name not in of.columns or any(name not in run[0].columns for run in runs):
                runs = self._runs(keys, name)
                of = runs[0][0] if runs else None
            if name in self._dtypes and (name in names or any(run[0] is not _NOWHERE for run in runs)):
                columns[name] = _join(runs, name, self._dtypes[name])
        return columns

    def length_of(self, keys: Sequence[RowKey], name: str) -> int:
        """Sum of the rows' lengths in this column."""
        total = 0
        for key in keys:
            place = self._place(key, name)
            if place is not None:
                offsets = place[0].columns[name].offsets
                total += int(offsets[place[1] + 1] - offsets[place[1]])
        return total

    def free(self, keys: Sequence[RowKey]) -> None:
        for key in keys:
            for parcel, _ in self._places.pop(key, ()):
                parcel.live -= 1
                if not parcel.live:
                    self.num_bytes -= parcel.num_bytes

    def _place(self, key: RowKey, name: str) -> Place | None:
        return next((place for place in self._places[key] if name in place[0].columns), None)

    def _runs(self, keys: Sequence[RowKey], name: str) -> list[tuple[Parcel, int, int]]:
        """(parcel, first, end) of the rows' places for this column; rows without it lie in `_NOWHERE`."""
        runs: list[tuple[Parcel, int, int]] = []
        last, first, end = _NOWHERE, 0, 0
        for key in keys:
            parcel, at = self._place(key, name) or (_NOWHERE, end)
            if parcel is last and at == end:
                end += 1
                continue
            if end > first:
                runs.append((last, first, end))
            last, first, end = parcel, at, at + 1
        if end > first:
            runs.append((last, first, end))
        return runs


_NOWHERE = Parcel({}, 0)


def _join(runs: Sequence[tuple[Parcel, int, int]], name: str, dtype: np.dtype) -> Column:
    parts = []
    for parcel, first, end in runs:
        is_there = parcel is not _NOWHERE
        parts.append(_slice(parcel.columns[name], first, end) if is_there else Column.empty_rows(end - first, dtype))
    return parts[0] if len(parts) == 1 else Column.concatenate(parts)


def _slice(column: Column, first: int, end: int) -> Column:
    offsets = column.offsets[first : end + 1]
    return Column(column.values[offsets[0] : offsets[-1]], offsets - offsets[0] if offsets[0] else offsets)
