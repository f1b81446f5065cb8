"""Versions appear whole, stay as long as they should, and are never written again."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.weights.store import WeightStore
from flowrl.weights.tensorfile import TensorFileLayout, write_tensors

SHAPES = {"a.weight": torch.Size([3, 5]), "b.bias": torch.Size([7]), "scale": torch.Size([])}


def layout(dtype: torch.dtype = torch.float32) -> TensorFileLayout:
    return TensorFileLayout(SHAPES, dtype)


def tensors(value: float) -> list[tuple[str, torch.Tensor]]:
    return [(name, torch.full(shape, value)) for name, shape in SHAPES.items()]


def publish(store: WeightStore, *versions: int) -> None:
    for version in versions:
        store.write(version, layout(), tensors(float(version)), [])


def value_of(path: Path) -> float:
    return float(load_file(path / "model.safetensors")["scale"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_reads_back_as_safetensors(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    given = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    write_tensors(tmp_path / "x.safetensors", layout(dtype), given.items())
    found = load_file(tmp_path / "x.safetensors")
    assert set(found) == set(given)
    for name, tensor in given.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor.to(dtype))


def test_only_the_newest_versions_stay(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, buffers=3)
    assert store.latest() is None
    publish(store, *range(6))
    assert store.versions() == [3, 4, 5]
    assert sorted(os.listdir(tmp_path)) == ["v00000003", "v00000004", "v00000005"]
    latest = store.latest()
    assert latest is not None and latest.version == 5 and value_of(latest.path) == 5.0


def test_published_version_is_never_written_again(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, buffers=3)
    publish(store, 1)
    with pytest.raises(ValueError, match="version: 1 is published"):
        store.write(1, layout(), tensors(9.0), [])
    assert value_of(store.path(1)) == 1.0
    assert not os.access(store.path(1) / "model.safetensors", os.W_OK) or os.geteuid() == 0
    assert (store.path(1) / "model.safetensors").stat().st_mode & 0o222 == 0


def test_pinned_version_survives_its_turn_until_unpinned(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, buffers=2)
    publish(store, 0)
    path = store.pin(0, "eval")
    assert store.pin(0, "eval") == path
    publish(store, 1, 2, 3)
    assert store.versions() == [2, 3]
    assert value_of(path) == 0.0
    store.unpin(0, "eval")
    store.unpin(0, "eval")
    assert not path.exists()
    with pytest.raises(FileNotFoundError):
        store.pin(0, "eval")
    assert os.listdir(path.parent) == []


def test_mapped_version_outlives_its_removal(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, buffers=1)
    publish(store, 7)
    mapped = load_file(store.path(7) / "model.safetensors")
    publish(store, 8, 9)
    assert not store.path(7).exists()
    assert mapped["a.weight"].eq(7.0).all()


def test_version_left_half_written_by_a_dead_writer_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".new-v00000004-123").mkdir()
    (tmp_path / ".new-v00000004-123" / "model.safetensors").write_bytes(b"half")
    store = WeightStore(tmp_path, buffers=2)
    assert store.versions() == []
    publish(store, 4)
    assert os.listdir(tmp_path) == ["v00000004"]


def test_versions_after_a_checkpoint_can_be_published_anew(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, buffers=3)
    publish(store, 1, 2, 3)
    store.discard_newer_than(1)
    store.write(2, layout(), tensors(20.0), [])
    assert store.versions() == [1, 2]
    assert value_of(store.path(2)) == 20.0


def test_failure_while_writing_leaves_nothing_behind(tmp_path: Path) -> None:
    store = WeightStore(tmp_path, buffers=2)

    def failing() -> object:
        yield tensors(1.0)[0]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        store.write(1, layout(), failing(), [])  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == []


def test_full_file_system_is_an_error_naming_the_size() -> None:
    store = WeightStore(Path("/dev/shm") / f"flowrl-test-{os.getpid()}", buffers=2)
    huge = TensorFileLayout({"w": torch.Size([1 << 50])}, torch.bfloat16)
    try:
        with pytest.raises(OSError, match=str(huge.num_bytes)) as caught:
            store.write(1, huge, [], [])
        assert caught.value.errno == errno.ENOSPC
        assert store.versions() == []
    finally:
        store.root.rmdir()


def test_store_without_room_for_a_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"weights\.buffers: 0"):
        WeightStore(tmp_path, buffers=0)
