"""Columns in memory and on the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transfer_queue import wire
from transfer_queue.errors import RowRefused, WireError
from transfer_queue.frames import MAX_ROWS, pack, unpack
from transfer_queue.rows import Column, RowKey, Rows


@given(
    st.lists(st.lists(st.integers(-1000, 1000), max_size=5), max_size=8), st.sampled_from(["int16", "float32", "int64"])
)
def test_columns_travel_unchanged(rows: list[list[int]], dtype: str) -> None:
    column = Column.ragged(rows, dtype)
    headers, frames = pack({"x": column})
    got = unpack(headers, frames, len(rows))["x"]
    assert got.values.dtype == column.values.dtype
    assert [row.tolist() for row in got] == [row.tolist() for row in column]


def test_one_value_a_row_needs_no_offsets_frame() -> None:
    headers, frames = pack({"x": Column.scalars([1.0, 2.0], "float32")})
    assert (len(frames), headers[0].ragged) == (1, False)


def test_frame_count_does_not_grow_with_rows() -> None:
    _, frames = pack({"x": Column.ragged([[1, 2]] * 500, "int32")})
    assert len(frames) == 2


def test_object_dtype_is_refused_by_name() -> None:
    with pytest.raises(RowRefused, match="'x' is object"):
        pack({"x": Column(np.array([object()]), np.array([0, 1]))})


@pytest.mark.parametrize(
    ("header", "frames", "num_rows"),
    [
        (wire.ColumnHeader("x", "int32", False), [b"\0" * 7], 1),
        (wire.ColumnHeader("x", "object", False), [b"\0" * 8], 1),
        (wire.ColumnHeader("x", "int32", True), [b"\0" * 8], 1),
        (wire.ColumnHeader("x", "int32", True), [b"\0" * 8, np.array([0, 3], "<i8").tobytes()], 1),
        (wire.ColumnHeader("x", "int32", True), [b"\0" * 8, np.array([0, 5, 2], "<i8").tobytes()], 2),
        (wire.ColumnHeader("x", "int32", True), [b"\0" * 8, np.array([-1, 2], "<i8").tobytes()], 1),
        (wire.ColumnHeader("x", "int32", True), [b"\0" * 8, b""], 1),
        (wire.ColumnHeader("x", "int32", False), [b"\0" * 4], MAX_ROWS + 1),
    ],
)
def test_frames_that_contradict_their_header_are_refused(
    header: wire.ColumnHeader, frames: list[bytes], num_rows: int
) -> None:
    with pytest.raises(WireError):
        unpack([header], [memoryview(frame) for frame in frames], num_rows)


def test_other_protocol_version_is_refused() -> None:
    header = bytearray(wire.encode(wire.Introspect(1)))
    header[len(wire.MAGIC) - 1] += 1
    with pytest.raises(WireError, match=f"version {wire.MAGIC[-1]}"):
        wire.decode_request(memoryview(bytes(header)))


def test_reply_is_no_request() -> None:
    with pytest.raises(WireError):
        wire.decode_request(memoryview(wire.encode(wire.Done(1, 0))))


def test_rows_of_unequal_columns_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="column 'x': 1 rows for 2 keys"):
        Rows([RowKey("train", 0, 0), RowKey("train", 0, 1)], {"x": Column.scalars([1], "int32")})


def test_selected_and_joined_rows_keep_keys_values_and_versions_together() -> None:
    keys = [RowKey("train", group, 0) for group in range(3)]
    rows = Rows(keys, {"x": Column.ragged([[1], [2, 2], []], "int32")}, [5, 6, 7])
    part = Rows.concatenate([rows.select([2]), rows.select([1])])
    assert (part.keys, part.versions, [row.tolist() for row in part["x"]]) == ([keys[2], keys[1]], [7, 6], [[], [2, 2]])
