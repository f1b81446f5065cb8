"""Rows as plain bytes, to be written to a file or sent to another rank. Never pickle."""

from __future__ import annotations

import msgspec
import numpy as np

from transfer_queue.rows import Column, RowKey, Rows


class ColumnBytes(msgspec.Struct, frozen=True, array_like=True):
    """offsets: int64."""

    dtype: str
    values: bytes
    offsets: bytes


class Parcel(msgspec.Struct, frozen=True, array_like=True):
    keys: list[RowKey]
    columns: dict[str, ColumnBytes]
    versions: list[int]

    @classmethod
    def of(cls, rows: Rows) -> Parcel:
        columns = {
            name: ColumnBytes(column.values.dtype.str, column.values.tobytes(), column.offsets.tobytes())
            for name, column in rows.columns.items()
        }
        return cls(list(rows.keys), columns, [int(version) for version in rows.versions])

    def rows(self) -> Rows:
        """With columns that are views of the bytes."""
        columns = {
            name: Column(np.frombuffer(column.values, column.dtype), np.frombuffer(column.offsets, np.int64))
            for name, column in self.columns.items()
        }
        return Rows(self.keys, columns, self.versions)
