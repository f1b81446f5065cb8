"""How columns become frames and come back: one contiguous buffer a column, and one of offsets where rows differ in
length.

Sizes, dtypes and offsets are checked before anything is allocated for them. Nothing is copied either way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from transfer_queue.config import MAX_COLUMNS
from transfer_queue.errors import RowRefused, WireError
from transfer_queue.narrow import may_stand_for
from transfer_queue.rows import Array, Column
from transfer_queue.wire import ColumnHeader, Placed

MAX_ROWS = 1 << 20
DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool", "uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64",
                 "float16", "float32", "float64")
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
OFFSETS = np.dtype("<i8")
RUN = np.dtype("<i4")
_NO_OFFSETS = np.empty(0, OFFSETS)


def pack(columns: Mapping[str, Column]) -> tuple[list[ColumnHeader], list[memoryview]]:
    """Headers and frames. Raises RowRefused for a dtype that does not travel."""
    headers = []
    frames = []
    for name, column in columns.items():
        dtype = travelling(name, column.dtype)
        offsets = offsets_to_send(column)
        headers.append(
            ColumnHeader(name, name_of(dtype), bool(len(offsets)), name_if_narrow(column.values.dtype, dtype))
        )
        frames.append(_bytes_of(column.values, column.values.dtype.newbyteorder("<")))
        if len(offsets):
            frames.append(_bytes_of(offsets, OFFSETS))
    return headers, frames


def travelling(name: str, dtype: np.dtype) -> np.dtype:
    """The form in which a dtype travels. Raises RowRefused for one that does not."""
    if dtype not in _NAMES:
        raise RowRefused(f"columns: {name!r} is {dtype}; what travels is {', '.join(DTYPES)}")
    return DTYPES[_NAMES[dtype]]


def name_of(dtype: np.dtype) -> str:
    """Of one that travels. numpy makes up the name anew each time one asks."""
    return _NAMES[dtype]


def name_if_narrow(values: np.dtype, dtype: np.dtype) -> str:
    return "" if values == dtype else name_of(values)


def bytes_of(name: str, dtype: str, narrow: str) -> np.dtype:
    """The type of a column's bytes. Raises WireError for what cannot be."""
    known = DTYPES.get(dtype)
    given = DTYPES.get(narrow) if narrow else known
    if known is None or given is None or not may_stand_for(given, known):
        raise WireError(f"column {name!r}: {narrow or dtype!r} does not stand for {dtype!r} here")
    return given


def offsets_to_send(column: Column) -> Array:
    """None, if every row has one value."""
    is_scalar = len(column.values) == len(column) and bool((column.offsets == scalar_offsets(len(column))).all())
    return _NO_OFFSETS if is_scalar else column.offsets


def num_bytes(placed: Placed) -> int:
    """Of the values, as far as their dtypes are known here."""
    dtypes = [(place.num_values, DTYPES.get(place.narrow or place.dtype)) for place in placed.columns]
    return sum(count * dtype.itemsize for count, dtype in dtypes if dtype is not None)


def check_put_bytes(num_bytes: int, limit: int) -> None:
    """Before anything is allocated for it."""
    if num_bytes > limit:
        raise RowRefused(f"columns: {num_bytes} bytes in one put; at most max_message_bytes, {limit}")


def check_size(num_columns: int, num_rows: int) -> None:
    if num_columns > MAX_COLUMNS or num_rows > MAX_ROWS:
        raise WireError(f"{num_columns} columns of {num_rows} rows; at most {MAX_COLUMNS} of {MAX_ROWS}")


def unpack(headers: Sequence[ColumnHeader], frames: Sequence[memoryview], num_rows: int) -> dict[str, Column]:
    """The columns as views of the frames, after every check."""
    check_size(len(headers), num_rows)
    if len(frames) != sum(1 + header.ragged for header in headers):
        raise WireError(f"{len(frames)} frames for {len(headers)} columns")
    columns: dict[str, Column] = {}
    rest = iter(frames)
    offsets, last, last_length = _NO_OFFSETS, None, -1
    for header in headers:
        if header.dtype not in DTYPES or header.name in columns:
            raise WireError(f"column {header.name!r} of dtype {header.dtype!r}: twice there, or of no known dtype")
        values = _array(header.name, next(rest), bytes_of(header.name, header.dtype, header.narrow))
        frame = next(rest) if header.ragged else None
        if frame is None or frame is not last or len(values) != last_length:  # or else they have been checked
            offsets = _array(header.name, frame, OFFSETS) if frame is not None else scalar_offsets(num_rows)
            check_offsets(header.name, offsets, len(values), num_rows)
        columns[header.name] = Column.checked(values, offsets, DTYPES[header.dtype])
        last, last_length = frame, len(values)
    return columns


def _array(name: str, frame: memoryview, dtype: np.dtype) -> Array:
    if frame.nbytes % dtype.itemsize:
        raise WireError(f"column {name!r}: {frame.nbytes} bytes are no whole number of {dtype}")
    return np.frombuffer(frame, dtype=dtype)


def check_offsets(name: str, offsets: Array, num_values: int, num_rows: int) -> None:
    spans = len(offsets) == num_rows + 1 and offsets[0] == 0 and offsets[-1] == num_values
    if not spans or (offsets[1:] < offsets[:-1]).any():
        raise WireError(f"column {name!r}: offsets do not describe {num_rows} rows of {num_values} values")


def scalar_offsets(num_rows: int) -> Array:
    return np.arange(num_rows + 1, dtype=np.int64)


def _bytes_of(array: Array, dtype: np.dtype) -> memoryview:
    return np.ascontiguousarray(array, dtype=dtype).view(np.uint8).data
