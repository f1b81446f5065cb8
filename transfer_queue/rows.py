"""What travels: row keys, columns and batches of rows.

A `Column` is one contiguous buffer plus offsets, so that rows of different lengths travel without padding and a message
holds as many frames as it has columns, however many rows there are. This file owns the in-memory form; `wire.py` owns
the form on a socket.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter, is_

import numpy as np

from transfer_queue.spans import Keys, RowKey

Array = np.ndarray
SMALL_BYTES = 64 << 10
"""Of memory; below this the allocator does well by itself."""
_ALIGNMENT = 64


class Column:
    """Rows of one column: `values[offsets[i]:offsets[i + 1]]` is row i.

    values: 1-D array of any whitelisted dtype, C-contiguous. offsets: int64, shape (rows + 1,), from 0 to len(values).
    dtype: that of the values, or what they stand for while they are narrow (`narrow.py`).
    """

    __slots__ = ("dtype", "offsets", "values")

    def __init__(self, values: Array, offsets: Array) -> None:
        if values.ndim != 1:
            raise ValueError(f"values: shape {values.shape}; a column is one-dimensional")
        if offsets.ndim != 1 or len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(values):
            raise ValueError(f"offsets: must run from 0 to {len(values)}, got {offsets[:3]}…{offsets[-1:]}")
        self.values = values
        self.offsets = offsets
        self.dtype = values.dtype

    @classmethod
    def checked(cls, values: Array, offsets: Array, dtype: np.dtype | None = None) -> Column:
        """Of what is known to fit together."""
        column = cls.__new__(cls)
        column.values = values
        column.offsets = offsets
        column.dtype = values.dtype if dtype is None else dtype
        return column

    @classmethod
    def scalars(cls, values: Array | Sequence[float], dtype: str | None = None) -> Column:
        """One value a row."""
        array = np.ascontiguousarray(values, dtype=dtype)
        return cls(array, np.arange(len(array) + 1, dtype=np.int64))

    @classmethod
    def ragged(cls, rows: Sequence[Array | Sequence[float]], dtype: str) -> Column:
        """One vector a row, of any lengths."""
        arrays = [np.asarray(row, dtype=dtype) for row in rows]
        lengths = np.fromiter((len(array) for array in arrays), dtype=np.int64, count=len(arrays))
        offsets = np.zeros(len(arrays) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        values = np.concatenate(arrays) if arrays else np.empty(0, dtype=dtype)
        return cls(values, offsets)

    @classmethod
    def concatenate(cls, columns: Sequence[Column]) -> Column:
        """A copy of all their rows."""
        return concatenate({"": columns})[""]

    @classmethod
    def empty_rows(cls, num_rows: int, dtype: np.dtype | str) -> Column:
        """Rows of length 0."""
        return cls(np.empty(0, dtype=dtype), np.zeros(num_rows + 1, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Array:
        """A view of row `index`."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def __iter__(self) -> Iterator[Array]:
        return (self[index] for index in range(len(self)))

    def slice(self, first: int, end: int) -> Column:
        """Rows first to end, as a view."""
        if first == 0 and end == len(self):
            return self
        offsets = self.offsets[first : end + 1]
        values = self.values[offsets[0] : offsets[-1]]
        return Column.checked(values, offsets - offsets[0] if offsets[0] else offsets, self.dtype)

    @property
    def lengths(self) -> Array:
        return np.diff(self.offsets)

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def select(self, indices: Iterable[int]) -> Column:
        return Column.ragged([self[index] for index in indices], self.values.dtype.str)


def _empty(num_bytes: int) -> Array:
    return np.empty(num_bytes, np.uint8)


def concatenate(
    parts: Mapping[str, Sequence[Column]], memory: Callable[[int], Array] = _empty, is_wide: bool = False
) -> dict[str, Column]:
    """A copy of all rows of each column; where the parts of columns share their offsets, so do the copies. memory: of
    so many bytes, uint8, for the values of all large columns, which asking once for each would take longer than copying
    some; a small one has memory of its own, so that whoever keeps it keeps nothing else. is_wide: narrow columns become
    what they stand for; or else they stay as narrow as their widest part. Parts of different types become what numpy
    makes of them."""
    flat = []
    end = 0
    for name, columns in parts.items():
        values = [column.values for column in columns]
        dtype, kept = _types(columns, is_wide)
        num_bytes = sum(map(len, values)) * kept.itemsize
        first, end = end, end + num_bytes if num_bytes >= SMALL_BYTES else end
        flat.append((name, columns, values, dtype, kept, first, end))
        end += -end % _ALIGNMENT
    room = memory(end)
    joined = {}
    offsets, sources = np.zeros(1, dtype=np.int64), [np.zeros(0)]
    for name, columns, values, dtype, kept, first, after in flat:
        others, sources = sources, [column.offsets for column in columns]
        if len(others) != len(sources) or not all(map(is_, others, sources)):
            offsets = _joined(sources)
        out = room[first:after].view(kept) if after > first else np.empty(sum(map(len, values)), kept)
        joined[name] = Column.checked(np.concatenate(values, out=out), offsets, dtype)
    return joined


def _types(columns: Sequence[Column], is_wide: bool) -> tuple[np.dtype, np.dtype]:
    """What the joined column stands for, and what it is kept in."""
    dtype = columns[0].dtype
    if any(column.dtype != dtype for column in columns):
        dtype = np.result_type(*(column.dtype for column in columns))
        return dtype, dtype
    kept = columns[0].values.dtype
    if is_wide or all(column.values.dtype is kept for column in columns):
        return dtype, dtype if is_wide else kept
    # Of one kind. Where nothing is, its type does not matter.
    return dtype, max({column.values.dtype for column in columns if len(column.values)} or {kept}, key=_itemsize)


def _joined(offsets: Sequence[Array]) -> Array:
    if len(offsets) == 1:
        return offsets[0].copy()
    found = np.zeros(sum(map(len, offsets)) - len(offsets) + 1, dtype=np.int64)
    np.cumsum(np.concatenate([np.diff(one) for one in offsets]), out=found[1:])
    return found


_itemsize = attrgetter("itemsize")


class Rows:
    """A batch as `take` gives it: keys, columns of equal length, and each row's version (its oldest token's)."""

    __slots__ = ("columns", "keys", "versions")

    def __init__(self, keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] = ()) -> None:
        for name, column in columns.items():
            if len(column) != len(keys):
                raise ValueError(f"column {name!r}: {len(column)} rows for {len(keys)} keys")
        self.keys: Sequence[RowKey] = keys if isinstance(keys, Keys) else list(keys)
        self.columns = dict(columns)
        self.versions = list(versions)

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    def __contains__(self, name: str) -> bool:
        return name in self.columns

    @property
    def nbytes(self) -> int:
        return sum(column.nbytes for column in self.columns.values())

    def select(self, indices: Sequence[int]) -> Rows:
        columns = {name: column.select(indices) for name, column in self.columns.items()}
        versions = [self.versions[index] for index in indices] if self.versions else ()
        return Rows([self.keys[index] for index in indices], columns, versions)

    @classmethod
    def concatenate(cls, parts: Sequence[Rows]) -> Rows:
        """Joins batches, in order. Of an optional column that a part came without, its rows have length 0."""
        dtypes = {name: column.values.dtype for part in parts for name, column in part.columns.items()}
        columns = concatenate(
            {
                name: [part[name] if name in part else Column.empty_rows(len(part), dtype) for part in parts]
                for name, dtype in dtypes.items()
            }
        )
        keys = [key for part in parts for key in part.keys]
        return cls(keys, columns, [version for part in parts for version in part.versions])
