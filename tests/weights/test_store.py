"""Versions appear whole, stay as long as they should, and no file is written to while somebody could read it."""

from __future__ import annotations

import errno
import mmap
import os
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.weights.buffers import Buffer, has_leases, is_open_here_alone
from flowrl.weights.pool import BufferPool
from flowrl.weights.store import WeightStore, reading
from flowrl.weights.tensorfile import WEIGHTS_FILE, Kind, TensorFileLayout, read_slots
from tests.weights.versions import LAYOUT, SHAPES, names, value_of, versions


def wait_until(condition: object, what: str) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"waited 20 s for {what}"
        time.sleep(0.005)


def test_file_reads_back_as_safetensors(tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        path = given.publish(4)
        assert path is not None
        found = load_file(path / WEIGHTS_FILE)
        assert {name: tensor.shape for name, tensor in found.items()} == SHAPES
        assert value_of(path) == 4.0
        assert read_slots(path / WEIGHTS_FILE) == LAYOUT.slots


def test_only_the_newest_versions_stay(tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        assert given.store.latest() is None
        for version in range(6):
            assert given.publish(version) == given.store.path(version)
        assert given.store.versions() == [3, 4, 5]
        assert names(tmp_path) == ["v00000003", "v00000004", "v00000005"]
        latest = given.store.latest()
        assert latest is not None and latest.version == 5 and value_of(latest.path) == 5.0
    assert sorted(os.listdir(tmp_path)) == ["v00000003", "v00000004", "v00000005"]


def test_files_are_reused_when_nobody_reads_them(tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        inodes = set()
        for version in range(40):
            path = given.publish(version)
            assert path is not None
            inodes.add((path / WEIGHTS_FILE).stat().st_ino)
        assert len(inodes) <= 4
        assert given.files() <= 4


def test_published_version_is_never_written_again(tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        path = given.publish(1)
        assert path is not None
        with pytest.raises(ValueError, match="version: 1 is published"):
            given.publish(1, value=9.0)
        assert value_of(path) == 1.0
        assert (path / WEIGHTS_FILE).stat().st_mode & 0o222 == 0


@pytest.mark.parametrize("way", ["open", "mapped", "held"])
def test_bytes_that_a_reader_has_do_not_change(way: str, tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        path = given.publish(0)
        assert path is not None
        expected = (path / WEIGHTS_FILE).read_bytes()
        with (path / WEIGHTS_FILE).open("rb") as file, reading(path):
            mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if way == "mapped" else None
            for version in range(1, 20):
                given.publish(version)
            if mapped is None:
                assert os.pread(file.fileno(), len(expected), 0) == expected
            else:
                assert mapped[:] == expected
                mapped.close()


def test_safetensors_mapping_outlives_its_version(tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        path = given.publish(7)
        assert path is not None
        mapped = load_file(path / WEIGHTS_FILE)
        for version in range(8, 30):
            given.publish(version)
        assert mapped["a.weight"].eq(7.0).all()


def test_trainer_never_waits_for_readers_and_the_newest_appears_when_one_lets_go(tmp_path: Path) -> None:
    with versions(tmp_path, buffers=2) as given:
        first = given.publish(0)
        assert first is not None
        wait_until(lambda: given.files() == 3, "all buffers")
        with reading(first):
            second = given.publish(1)
            assert second is not None
            with reading(second):
                assert [given.publish(version) for version in range(2, 9)] == [None] * 7
                assert given.store.versions()[-1] == 1 and given.files() <= 3
                assert value_of(second) == 1.0
        wait_until(lambda: given.store.versions()[-1] == 8, "the version that waited")
        assert value_of(given.store.path(8)) == 8.0
        assert given.shown == [0, 1, 8]


def test_newest_visible_version_is_never_taken_back(tmp_path: Path) -> None:
    """With two buffers, one of them held, the other is the newest and must stay until there is a newer one."""
    with versions(tmp_path, buffers=2) as given:
        first = given.publish(0)
        assert first is not None
        with reading(first):
            given.publish(1)
            for version in range(2, 50):
                given.publish(version)
                latest = given.store.latest()
                assert latest is not None and value_of(latest.path) == latest.version


def test_pinned_version_survives_its_turn_until_unpinned(tmp_path: Path) -> None:
    with versions(tmp_path, buffers=2) as given:
        path = given.publish(0)
        assert path is not None
        pinned = given.store.pin(0, "eval")
        assert given.store.pin(0, "eval") == pinned
        for version in range(1, 9):
            assert given.publish(version) is not None
            wait_until(lambda: given.files() == 3, "another buffer in its place")
        assert given.store.pinned("eval") == [(0, pinned)]
        assert value_of(pinned) == 0.0
        given.store.unpin(0, "eval")
        given.store.unpin(0, "eval")
        assert not pinned.exists()
        with pytest.raises(FileNotFoundError):
            given.store.pin(0, "eval")
        assert os.listdir(pinned.parent) == []


def test_version_that_has_to_wait_is_pinned_at_once(tmp_path: Path) -> None:
    with versions(tmp_path, buffers=2) as given:
        path = given.publish(0)
        assert path is not None
        wait_until(lambda: given.files() == 3, "all buffers")
        given.publish(1)
        with reading(path):
            assert given.publish(2, pin="eval") is None
            assert given.publish(3) is None
            ((version, pinned),) = given.store.pinned("eval")
            assert version == 2 and value_of(pinned) == 2.0


def test_reader_that_comes_too_late_finds_nothing(tmp_path: Path) -> None:
    with versions(tmp_path, buffers=2) as given:
        path = given.publish(0)
        assert path is not None
        for version in range(1, 5):
            given.publish(version)
        with pytest.raises(FileNotFoundError), reading(path):
            pass


def test_what_a_dead_writer_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".buffer-2").mkdir()
    (tmp_path / ".buffer-2" / WEIGHTS_FILE).write_bytes(b"half")
    assert WeightStore(tmp_path, 2).versions() == []
    with versions(tmp_path, buffers=2) as given:
        given.publish(4)
    assert os.listdir(tmp_path) == ["v00000004"]


def test_versions_of_a_writer_before_are_removed_in_their_turn(tmp_path: Path) -> None:
    for start in (0, 3):
        with versions(tmp_path, buffers=2) as given:
            for version in range(start, start + 3):
                given.publish(version)
    assert names(tmp_path) == ["v00000004", "v00000005"]


def test_versions_after_a_checkpoint_can_be_published_anew(tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        for version in (1, 2, 3):
            given.publish(version)
        given.pool.discard_newer_than(1)
        assert given.store.versions() == [1]
        given.publish(2, value=20.0)
        assert given.store.versions() == [1, 2]
        assert value_of(given.store.path(2)) == 20.0


def test_pins_after_a_checkpoint_go_with_their_versions(tmp_path: Path) -> None:
    """On a disk that an earlier life has left: else its pin would stand for the version that is published anew."""
    with versions(tmp_path) as given:
        for version in (1, 2):
            given.publish(version, pin="eval")
    given.store.discard_newer_than(1)
    assert [pinned.version for pinned in given.store.pinned("eval")] == given.store.versions() == [1]


def test_abandoned_version_is_never_seen(tmp_path: Path) -> None:
    with versions(tmp_path) as given:
        given.publish(0)
        given.pool.abandon(given.pool.begin())
        assert given.store.versions() == [0]
        assert given.publish(1) is not None


def test_full_file_system_is_an_error_naming_the_size() -> None:
    store = WeightStore(Path("/dev/shm") / f"flowrl-test-{os.getpid()}", buffers=2)
    huge = TensorFileLayout({"w": Kind(torch.Size([1 << 50]), torch.bfloat16)})
    pool = BufferPool(store, huge, [], lambda version, path: None)
    try:
        with pytest.raises(OSError, match=str(huge.num_bytes)) as caught:
            pool.begin()
        assert caught.value.errno == errno.ENOSPC
        assert store.versions() == []
    finally:
        pool.close()
        store.root.rmdir()


def test_store_without_room_for_a_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\.buffers: 1; must be at least 2"):
        WeightStore(tmp_path, buffers=1)


def test_kernel_tells_whether_somebody_reads(tmp_path: Path) -> None:
    """The rule that all of this rests on, for open and for mapped files, and in spite of the writer's own mapping."""
    assert has_leases(tmp_path)
    buffer = Buffer(0, tmp_path / "buffer", LAYOUT, [])
    assert buffer.is_unread()
    with (buffer.path / WEIGHTS_FILE).open("rb") as file:
        assert not buffer.is_unread()
        mapped = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
    assert not is_open_here_alone(buffer.fd)
    mapped.close()
    assert buffer.is_unread()
    os.link(buffer.path / WEIGHTS_FILE, tmp_path / "pin")
    assert not buffer.is_unread() and buffer.is_pinned()
    buffer.drop()
