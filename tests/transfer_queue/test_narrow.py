"""Integers that travel and rest in fewer bytes than they are put in: nobody can tell, but for the bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.transfer_queue.conftest import CONSUMERS
from tests.transfer_queue.test_durability import DurableShard
from transfer_queue import wire
from transfer_queue.client import QueueClient
from transfer_queue.clock import LocalClock
from transfer_queue.errors import RowRefused, WireError
from transfer_queue.frames import pack, unpack
from transfer_queue.narrow import NARROW_BYTES, narrowed, narrowest, widened
from transfer_queue.rows import Column, concatenate
from transfer_queue.segments import PrivateSpace
from transfer_queue.spans import Span
from transfer_queue.staleness import Accounts
from transfer_queue.storage import Storage
from transfer_queue.writer import view

Make = Callable[..., Any]
WIDE = ("int64", "int32", "int16", "uint64", "uint32", "uint16")
MANY = NARROW_BYTES  # values, so that those of one byte are many enough too


def fresh(num_bytes: int) -> np.ndarray:
    return np.empty(num_bytes, np.uint8)


def column(dtype: str, least: int, most: int, rows: int = 4) -> Column:
    values = np.random.default_rng(0).integers(least, most, rows * MANY, dtype, endpoint=True)
    values[:2] = least, most
    return Column(values, np.arange(rows + 1, dtype=np.int64) * MANY)


@st.composite
def columns(draw: st.DrawFn) -> Column:
    dtype = draw(st.sampled_from(WIDE))
    # Ends of every narrower type, and their neighbours, are what goes wrong if something does.
    ends = [0, 1, -1, *(one for bits in (7, 8, 15, 16, 31, 32, 63, 64) for one in (2**bits - 1, 2**bits, -(2**bits)))]
    known = np.iinfo(dtype)
    end = st.sampled_from([one for one in ends if known.min <= one <= known.max]) | st.integers(known.min, known.max)
    least, most = sorted((draw(end), draw(end)))
    return column(dtype, least, most, rows=draw(st.integers(1, 3)))


@given(columns())
def test_the_narrowest_type_holds_every_value_and_no_narrower_one_does(given: Column) -> None:
    kept = narrowest(given)
    least, most = int(given.values.min()), int(given.values.max())
    fitting = [
        np.dtype(f"{given.dtype.kind}{size}")
        for size in (1, 2, 4, 8)
        if np.iinfo(f"{given.dtype.kind}{size}").min <= least and most <= np.iinfo(f"{given.dtype.kind}{size}").max
    ]
    assert kept == fitting[0]
    back = widened(narrowed(given), fresh)
    assert back.dtype == back.values.dtype == given.dtype
    assert np.array_equal(back.values, given.values)


@given(st.lists(columns(), min_size=1, max_size=3))
def test_what_was_narrow_comes_back_through_frames_segments_and_joins(given: list[Column]) -> None:
    """Parts of one column are as narrow as each may be."""
    given = [one for one in given if one.dtype == given[0].dtype]
    storage = Storage(PrivateSpace())
    for group, one in enumerate(given):
        headers, frames = pack({"x": narrowed(one)})
        arrived = unpack(headers, frames, len(one))
        assert arrived["x"].values.nbytes == sum(map(len, frames[:1])) <= one.values.nbytes
        storage.store([(Span("train", group, 0, 0, len(one)), 0)], arrived)
    spans = [Span("train", group, 0, 0, len(one)) for group, one in enumerate(given)]
    assert storage.num_bytes == sum(len(one.values) * narrowest(one).itemsize for one in given)
    assert all(storage.holds(span, {"x": one}) for span, one in zip(spans, given, strict=True))
    gathered = widened(storage.gather(spans, ["x"])["x"], fresh)
    where = storage.locate(spans, ["x"])
    parcels = [
        view(storage.heap.held(at.segment).segment, at.columns, at.num_rows)["x"] for at in where.placed
    ]  # as a reader on the shard's node sees them
    joined = concatenate({"x": parcels}, is_wide=True)["x"]
    for found in (gathered, joined):
        assert found.dtype == found.values.dtype == given[0].dtype
        assert [row.tolist() for row in found] == [row.tolist() for one in given for row in one]


def test_small_columns_and_other_types_stay_as_they_are() -> None:
    one = Column(np.ones(NARROW_BYTES // 8 - 1, np.int64), np.array([0, NARROW_BYTES // 8 - 1]))
    assert narrowest(one) == np.int64
    for dtype in ("float64", "float32", "bool", "uint8"):
        assert narrowed(Column(np.ones(MANY, dtype), np.array([0, MANY]))).values.dtype == dtype


@pytest.mark.parametrize(
    "dtype, narrow", [("int64", "uint8"), ("int64", "float32"), ("int16", "int32"), ("bool", "int8")]
)
def test_bytes_that_cannot_stand_for_a_column_are_refused(dtype: str, narrow: str) -> None:
    header = wire.ColumnHeader("x", dtype, False, narrow)
    with pytest.raises(WireError, match=f"'x': '{narrow}' does not stand for '{dtype}'"):
        unpack([header], [memoryview(bytes(np.dtype(narrow).itemsize * 4))], 4)
    place = wire.ColumnPlace("x", dtype, 4, 64, 0, narrow)
    with pytest.raises(WireError, match=f"'x': '{narrow}' does not stand for '{dtype}'"):
        view(PrivateSpace().create("0.0", 4096), [place], 4)


@pytest.mark.parametrize("writes_near", [False, True])
@pytest.mark.parametrize("reads_near", [False, True])
def test_clients_near_and_far_get_what_was_put(serve: Make, writes_near: bool, reads_near: bool) -> None:
    """Three puts with values of other sizes, one of them sent twice, taken as one."""
    endpoint = serve(LocalClock(Accounts(1024, 0))).endpoint
    given = [column("int64", 0, 1), column("int64", 0, 150_000), column("int64", -5, 2**40)]
    with QueueClient(endpoint, shares_memory=writes_near) as producer:
        producer.announce("p", 0)
        for one in given:
            (group,) = producer.reserve("p", 1, 4)
            for _ in range(2):
                assert producer.put(group.keys, {"tokens": one}) == 4
        with pytest.raises(RowRefused, match="'tokens' is int32; it came as int64 before"):
            producer.put(producer.reserve("p", 1, 4)[0].keys, {"tokens": column("int32", 0, 1)})
        (state,) = producer.introspect().values()
        assert state["stored_bytes"] == 4 * MANY * (1 + 4 + 8)
        with QueueClient(endpoint, shares_memory=reads_near) as consumer:
            rows = consumer.take("reward", 12).rows
            assert rows["tokens"].values.dtype == np.int64
            assert [row.tolist() for row in rows["tokens"]] == [row.tolist() for one in given for row in one]


def test_narrow_rows_survive_the_death_of_their_shard(tmp_path: Path) -> None:
    shard = DurableShard(tmp_path)
    shard.start()
    given = column("int64", -100, 100)
    try:
        with QueueClient(shard.endpoint) as client:
            client.announce("p", 0)
            (group,) = client.reserve("p", 1, 4)
            client.put(group.keys, {"tokens": given})
        shard.kill()
        shard.start()
        with QueueClient(shard.endpoint) as client:
            rows = client.take("reward", 4).rows
            assert rows["tokens"].values.dtype == np.int64
            assert np.array_equal(rows["tokens"].values, given.values)
    finally:
        shard.close()


def test_narrow_rows_are_saved_and_restored(serve: Make, tmp_path: Path) -> None:
    given = column("int32", 0, 200)
    with QueueClient(serve(LocalClock(Accounts(4, 0)), save_dir=str(tmp_path)).endpoint) as client:
        client.announce("p", 0)
        (group,) = client.reserve("p", 1, 4)
        client.put(group.keys, {"tokens": given})
        assert client.save("saved") == 4
    assert sum(path.stat().st_size for path in (tmp_path / "saved").iterdir()) < 3 * len(given.values)
    again = serve(LocalClock(Accounts(4, 0)), restore_dir=str(tmp_path / "saved"), consumers=CONSUMERS)
    with QueueClient(again.endpoint) as client:
        rows = client.take("reward", 4).rows
        assert rows["tokens"].values.dtype == np.int32
        assert np.array_equal(rows["tokens"].values, given.values)
