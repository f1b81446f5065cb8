"""Where rows lie: shared memory, what is freed and compacted, and what is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.transfer_queue.conftest import CONSUMERS
from transfer_queue.client import QueueClient
from transfer_queue.clock import LocalClock
from transfer_queue.config import QueueConfig
from transfer_queue.errors import QueueError, RowRefused, WireError
from transfer_queue.heap import IDLE_BYTES
from transfer_queue.reader import SegmentReader
from transfer_queue.rows import Column
from transfer_queue.segments import SharedSpace, sweep
from transfer_queue.server import QueueServer
from transfer_queue.spans import Span
from transfer_queue.staleness import Accounts
from transfer_queue.storage import Storage
from transfer_queue.wire import ColumnPlace, Delivered, Layout, Placed
from transfer_queue.writer import SegmentWriter, view

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def space(tmp_path: Path) -> Iterator[SharedSpace]:
    made = SharedSpace.make(tmp_path / "shard")
    yield made
    made.close()


def whole(group: int, rows: int) -> Span:
    return Span("train", group, 0, 0, rows)


def tokens(rows: int, length: int, seed: int = 0) -> Column:
    draw = np.random.default_rng(seed)
    return Column.ragged([draw.integers(0, 1000, length) for _ in range(rows)], "int64")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_stored_comes_back_through_any_frees_and_moves(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Against a dictionary: groups of rows of any lengths, freed in any order, copied and read from the segments."""
    space = SharedSpace.make(tmp_path_factory.mktemp("s") / "shard")
    storage, reader, kept = Storage(space), SegmentReader(space), {}
    for group in range(data.draw(st.integers(1, 6))):
        rows = [data.draw(st.lists(st.integers(0, 99), max_size=9)) for _ in range(data.draw(st.integers(1, 5)))]
        storage.store(
            [(whole(group, len(rows)), 0)],
            {"x": Column.ragged(rows, "int32"), "n": Column.scalars([len(row) for row in rows], "uint16")},
        )
        kept |= {(group, index): row for index, row in enumerate(rows)}
    for freed in data.draw(st.permutations(sorted(kept)))[: data.draw(st.integers(0, len(kept)))]:
        storage.free([(("train", freed[0], 0), 1 << freed[1])])
        del kept[freed]
        if not kept:
            break
        wanted = data.draw(st.lists(st.sampled_from(sorted(kept)), min_size=1, unique=True))
        spans = [Span("train", group, 0, index, index + 1) for group, index in wanted]
        where = storage.locate(spans, ("x", "n"))
        near = reader.read(Delivered(1, spans, where.columns, [], False, where.placed, where.layouts))
        far = storage.gather(spans, ("x", "n"))
        for got in (near, far):
            assert got is not None
            assert [list(row) for row in got["x"]] == [kept[key] for key in wanted]
            assert list(got["n"].values) == [len(kept[key]) for key in wanted]
    assert len(storage) == len(kept)
    if not kept:
        assert storage.num_bytes == 0
    space.close()


def test_a_slow_row_does_not_hold_on_to_its_batch(space: SharedSpace) -> None:
    storage = Storage(space)
    for batch in range(20):
        storage.store([(whole(batch, 256), 0)], {"tokens": tokens(256, 1024)})
        storage.free([(("train", batch, 0), ((1 << 256) - 1) ^ 0b11)])
    live = 20 * 2 * 8 * 1024
    assert storage.num_bytes <= 2 * live
    on_disk = sum(entry.stat().st_size for entry in os.scandir(space.path))
    assert on_disk <= IDLE_BYTES + 2 * live + (8 << 20)
    got = storage.gather([Span("train", 7, 0, 0, 2)], ("tokens",))["tokens"]
    assert np.array_equal(got.values, tokens(256, 1024).values[: 2 * 1024])


def test_a_reader_notices_that_what_it_copied_was_taken_back(space: SharedSpace) -> None:
    storage, reader = Storage(space), SegmentReader(space)
    storage.store([(whole(0, 2), 0)], {"x": Column.scalars([1, 2], "int32")})
    where = storage.locate([whole(0, 2)], ("x",))
    told = Delivered(1, [whole(0, 2)], where.columns, [], False, where.placed, where.layouts)
    assert reader.read(told) is not None
    storage.free([(("train", 0, 0), 0b11)])
    assert reader.read(told) is None


def test_segments_are_filled_again(space: SharedSpace) -> None:
    storage = Storage(space)
    for batch in range(50):
        storage.store([(whole(batch, 256), 0)], {"tokens": tokens(256, 1024)})
        storage.free([(("train", batch, 0), (1 << 256) - 1)])
    assert len([name for name in os.listdir(space.path) if name.startswith("0.")]) <= 2


def test_a_writer_leaves_a_segment_alone_into_which_more_is_on_its_way(space: SharedSpace) -> None:
    storage = Storage(space)
    writer = SegmentWriter(space, storage.heap.add_writer())
    column = {"x": Column.scalars([1, 2], "int32")}
    (first, places), (again, _) = writer.write(column), writer.write(column)
    assert first.name == again.name
    placed = Placed(first.name, 0, 2, places)
    storage.store([(whole(0, 2), 0)], storage.open(placed, 2), placed)
    storage.free([(("train", 0, 0), 0b11)])
    writer.recycle(storage.recycled(placed))
    (third, third_places) = writer.write(column)
    assert third_places[0].values_at > places[0].values_at, "the second put has not been seen by the shard"
    assert third.name == first.name


def test_places_outside_their_segment_are_refused(space: SharedSpace) -> None:
    segment = space.create("3.0", 1 << 16)
    for place in (
        ColumnPlace("x", "int64", 1 << 13, 64, 0),
        ColumnPlace("x", "int64", 1, 0, 0),
        ColumnPlace("x", "int64", 1, 65, 0),
        ColumnPlace("x", "int64", -1, 64, 0),
        ColumnPlace("x", "int64", 1, 64, 1 << 16),
    ):
        with pytest.raises(WireError, match=r"column 'x'"):
            view(segment, [place], 1)
    with pytest.raises(RowRefused, match="'x' is object"):
        view(segment, [ColumnPlace("x", "object", 1, 64, 0)], 1)
    for name in ("../etc", "3.0/..", "", "owner"):
        with pytest.raises(WireError, match="segment"):
            space.open(name)


def test_a_directory_without_room_is_refused_by_name(tmp_path: Path) -> None:
    config = QueueConfig(
        endpoint=f"ipc://{tmp_path}/s", consumers=CONSUMERS, byte_limit=1 << 60, segment_dir=str(tmp_path)
    )
    with pytest.raises(ValueError, match=r"byte_limit: 1099511627776 MiB; .* Lower byte_limit, or set segment_dir"):
        QueueServer(config, LocalClock(Accounts(4, 0)))


def test_nothing_is_left_after_a_clean_stop(tmp_path: Path) -> None:
    directory = str(tmp_path / "segments")
    config = QueueConfig(endpoint=f"ipc://{tmp_path}/shard", consumers=CONSUMERS, segment_dir=directory)
    server = QueueServer(config, LocalClock(Accounts(4, 0)))
    thread = threading.Thread(target=server.serve)
    thread.start()
    with QueueClient(server.endpoint) as client:
        client.announce("p", 0)
        (group,) = client.reserve("p", 1, 2)
        client.put(group.keys, {"tokens": tokens(2, 4)})
        assert len(client.take("reward", 2).rows) == 2
        assert list((tmp_path / "segments").iterdir())
    server.stop()
    thread.join(10)
    server.close()
    assert not list((tmp_path / "segments").iterdir())


def test_what_a_killed_shard_left_goes_at_the_next_start(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from transfer_queue.segments import SharedSpace\n"
        f"space = SharedSpace.make(Path({str(tmp_path)!r}) / 'a'); space.create('1.0', 1 << 16)\n"
        "print('made', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"made\n"
        assert sweep(tmp_path) == [], "it lives"
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert sweep(tmp_path) == [tmp_path / "a"]
    assert not (tmp_path / "a").exists()


def test_layouts_of_rows_without_a_column_have_length_zero(space: SharedSpace) -> None:
    storage, reader = Storage(space), SegmentReader(space)
    for group in (0, 1):
        storage.store([(whole(group, 2), 0)], {"x": Column.scalars([group, group], "int32")})
    storage.store([(whole(1, 2), 0)], {"extra": Column.ragged([[1.0], [2.0, 3.0]], "float32")})
    spans = [whole(0, 2), whole(1, 2)]
    where = storage.locate(spans, ("x",), ("extra", "never"))
    assert isinstance(where.layouts[0], Layout)
    got = reader.read(Delivered(1, spans, where.columns, [], False, where.placed, where.layouts))
    assert got is not None and list(got) == ["x", "extra"]
    assert list(got["extra"].lengths) == [0, 0, 1, 2]


def test_a_full_directory_is_an_error_that_names_it(tmp_path: Path, space: SharedSpace) -> None:
    with pytest.raises(QueueError, match="no room for"):
        space.create("9.9", 1 << 50)
    assert not (Path(space.path) / "9.9").exists()
