"""Integers travel and rest in the narrowest type that holds them: token ids below 2³¹ in four bytes instead of eight,
masks in one. Whoever takes them gets the type that was put.

Half the bytes of a batch are saved that way, on every copy and on every wire, for one look at the values. What is small
is left alone: there the time goes into messages, not into bytes. A column that is narrow says what it stands for
(`Column.dtype`); outside of the queue no column is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from transfer_queue.rows import Array, Column

NARROW_BYTES = 32 << 10
"""Of values; smaller columns stay as they are."""
_FEW = 64
_NARROWER = {
    np.dtype(wide): [np.dtype(narrow) for narrow in narrower]
    for wide, narrower in {
        "<i8": ("<i1", "<i2", "<i4"), "<i4": ("<i1", "<i2"), "<i2": ("<i1",),
        "<u8": ("<u1", "<u2", "<u4"), "<u4": ("<u1", "<u2"), "<u2": ("<u1",),
    }.items()
}  # fmt: skip
_MOST = {dtype: (np.iinfo(dtype).min, np.iinfo(dtype).max) for dtypes in _NARROWER.values() for dtype in dtypes}


def narrowest(column: Column) -> np.dtype:
    """What its values travel and rest in."""
    values = column.values
    if values.nbytes < NARROW_BYTES or values.dtype != column.dtype or values.dtype not in _NARROWER:
        return values.dtype
    few = values[:: len(values) // _FEW]  # if these do not fit already, the others need no look
    return values.dtype if _fitting(few) == values.dtype else _fitting(values)


def _fitting(values: Array) -> np.dtype:
    least, most = int(values.min()), int(values.max())
    for dtype in _NARROWER[values.dtype]:
        if _MOST[dtype][0] <= least and most <= _MOST[dtype][1]:
            return dtype
    return values.dtype


def may_stand_for(narrow: np.dtype, dtype: np.dtype) -> bool:
    return narrow == dtype or narrow in _NARROWER.get(dtype, ())


def narrowed(column: Column) -> Column:
    """A copy, if it is not as narrow as it can be."""
    dtype = narrowest(column)
    if dtype == column.values.dtype:
        return column
    return Column.checked(column.values.astype(dtype), column.offsets, column.dtype)


def widened(column: Column, memory: Callable[[int], Array]) -> Column:
    """With values of the type it stands for: a copy, if it was narrow. memory: of so many bytes, uint8."""
    if column.values.dtype == column.dtype:
        return column
    values = memory(len(column.values) * column.dtype.itemsize).view(column.dtype)
    values[:] = column.values
    return Column.checked(values, column.offsets)
