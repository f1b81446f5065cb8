"""Mappings that stay while a buffer is written to again: when they are there, when they go, and whose they may be."""

from __future__ import annotations

import os
import shutil
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.weights.loading import Loader
from flowrl.weights.mappings import Mappings, MappingServer
from flowrl.weights.store import reading, weights_file
from flowrl.weights.tensorfile import WEIGHTS_FILE
from tests.weights.versions import SHAPES, Versions, versions

BUFFERS = 3


@pytest.fixture
def published(tmp_path: Path) -> Iterator[Versions]:
    with versions(tmp_path / "weights", BUFFERS) as opened:
        yield opened


def bytes_of(mappings: Mappings, path: Path) -> np.ndarray | None:
    """A copy of the whole file, out of its mapping."""
    with reading(path), weights_file(path).open("rb") as file:
        found = mappings.of(file.fileno(), path)
        return None if found is None else found.copy()


def wait_for_bytes(mappings: Mappings, path: Path) -> np.ndarray:
    deadline = time.monotonic() + 10
    while (found := bytes_of(mappings, path)) is None:
        assert time.monotonic() < deadline, "it is not mapped"
        time.sleep(0.001)
    return found


def test_a_mapping_stays_and_shows_what_is_written_to_its_buffer_later(published: Versions) -> None:
    mappings, inodes = Mappings(), set()
    for version in range(4 * (BUFFERS + 1)):
        path = published.publish(version)
        assert path is not None, "nobody reads: a mapping is nobody"
        inodes.add(os.stat(path / WEIGHTS_FILE).st_ino)
        found = wait_for_bytes(mappings, path)
        assert found.tobytes() == (path / WEIGHTS_FILE).read_bytes()
    assert len(inodes) == len(mappings._kept) == BUFFERS + 1, "no buffer was given up for them"


def test_a_loader_uses_them_from_the_second_time_on(published: Versions) -> None:
    tensors = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    loader = Loader(tensors)
    assert loader._mappings is not None
    path = published.publish(7)
    assert path is not None
    loader.load(path)
    wait_for_bytes(loader._mappings, path)
    for tensor in tensors.values():
        tensor.zero_()
    loader.load(path)
    assert all((tensor == 7).all() for tensor in tensors.values())


def test_those_of_files_without_a_name_are_let_go(published: Versions) -> None:
    mappings = Mappings()
    path = published.publish(0)
    assert path is not None
    wait_for_bytes(mappings, path)
    gone = [weakref.ref(mapping) for mapping in mappings._kept.values()]
    shutil.rmtree(path)
    path = published.publish(1)
    assert path is not None
    bytes_of(mappings, path)
    assert [mapping() for mapping in gone] == [None]


def test_a_directory_of_no_writer_has_none(tmp_path: Path) -> None:
    path = tmp_path / "root" / "v00000000"
    path.mkdir(parents=True)
    (path / WEIGHTS_FILE).write_bytes(b"x" * 100)
    mappings = Mappings()
    for _ in range(3):
        assert bytes_of(mappings, path) is None
        time.sleep(0.05)


def test_another_file_than_the_one_asked_for_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "root" / "v00000000"
    path.mkdir(parents=True)
    (path / WEIGHTS_FILE).write_bytes(b"x" * 100)
    (tmp_path / "other").write_bytes(b"y" * 100)
    with (tmp_path / "other").open("rb") as other:
        server = MappingServer(tmp_path / "root", lambda inode: other.fileno())
        mappings = Mappings()
        for _ in range(3):
            assert bytes_of(mappings, path) is None
            time.sleep(0.05)
        server.close()
    assert not (tmp_path / "root" / ".readers").exists()
