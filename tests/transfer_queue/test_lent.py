"""What is still being sent out of a segment is not written over: a segment is lent as long as anybody refers to it."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest

from transfer_queue.frames import pack
from transfer_queue.rows import Column
from transfer_queue.segments import PrivateSpace, SharedSpace
from transfer_queue.spans import Span
from transfer_queue.storage import LENT_BYTES, Storage
from transfer_queue.writer import SHARED_PUT_BYTES, Space

GROUP = ("train", 0, 0)
ROWS = Span(*GROUP, 0, 4)


@pytest.fixture(params=["private", "shared"])
def storage(request: pytest.FixtureRequest, tmp_path: Path):
    space: Space = PrivateSpace() if request.param == "private" else SharedSpace.make(tmp_path / "shard")
    yield Storage(space)
    space.close()


def batch(value: int, num_bytes: int = 2 * SHARED_PUT_BYTES) -> dict[str, Column]:
    values = np.full(num_bytes // 8, value, np.float64)
    return {"x": Column(values, np.arange(5, dtype=np.int64) * (len(values) // 4))}


def test_a_large_column_is_lent_and_its_segment_comes_back_once_it_is_sent(storage: Storage) -> None:
    storage.store([(ROWS, 0)], batch(1))  # so large that each has a segment of its own
    segment = next(storage.parcels()).held.segment
    frames = pack(storage.gather([ROWS], ["x"]))[1]
    values = np.frombuffer(frames[0], np.float64)
    assert np.shares_memory(values, segment.bytes), "not copied"
    storage.free([(GROUP, 0b1111)])
    storage.store([(Span("train", 1, 0, 0, 4), 0)], batch(2))
    assert (values == 1).all(), "what is being sent was written over"
    del frames, values
    gc.collect()
    assert not segment.is_lent
    both = {segment.name, next(storage.parcels()).held.segment.name}
    assert len(both) == 2, "written elsewhere meanwhile"
    storage.free([(("train", 1, 0), 0b1111)])
    for group in (2, 3):
        storage.store([(Span("train", group, 0, 0, 4), 0)], batch(group))
    assert {parcel.held.segment.name for parcel in storage.parcels()} == both, "both are filled again"


@pytest.mark.parametrize("num_bytes", [LENT_BYTES // 2, 4 * LENT_BYTES])
def test_rows_of_several_parcels_and_small_ones_are_copied(num_bytes: int, storage: Storage) -> None:
    spans = [ROWS]
    storage.store([(ROWS, 0)], batch(1, num_bytes))
    if num_bytes > LENT_BYTES:
        spans.append(Span("train", 1, 0, 0, 4))
        storage.store([(spans[1], 0)], batch(2, num_bytes))
    column = storage.gather(spans, ["x"])["x"]
    for parcel in storage.parcels():
        assert not np.shares_memory(column.values, parcel.held.segment.bytes)
        assert not parcel.held.segment.is_lent
