"""Small versions, each full of its own number, written straight through a pool."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from flowrl.weights.pool import BufferPool
from flowrl.weights.store import WeightStore
from flowrl.weights.tensorfile import WEIGHTS_FILE, Kind, TensorFileLayout

SHAPES = {"a.weight": torch.Size([3, 5]), "b.bias": torch.Size([7]), "scale": torch.Size([])}
LAYOUT = TensorFileLayout({name: Kind(shape, torch.float32) for name, shape in SHAPES.items()})


class Versions:
    """A pool, and what it has said to be published."""

    def __init__(self, root: Path, buffers: int = 3, layout: TensorFileLayout = LAYOUT) -> None:
        self.store = WeightStore(root, buffers)
        self.layout = layout
        self.shown: list[int] = []
        self.pool = BufferPool(self.store, layout, [], lambda version, path: self.shown.append(version))

    def publish(self, version: int, value: float | None = None, pin: str = "") -> Path | None:
        buffer = self.pool.begin()
        fill(buffer.bytes, self.layout, float(version) if value is None else value)
        return self.pool.commit(buffer, version, pin)

    def files(self) -> int:
        """Weight files that exist under the root, pins apart."""
        return sum(1 for path in self.store.root.glob("*/" + WEIGHTS_FILE))


@contextmanager
def versions(root: Path, buffers: int = 3) -> Iterator[Versions]:
    opened = Versions(root, buffers)
    try:
        yield opened
    finally:
        opened.pool.close()


def fill(file: torch.Tensor, layout: TensorFileLayout, value: float) -> None:
    for slot in layout.slots.values():
        file[slot.begin : slot.begin + slot.kind.num_bytes].view(slot.kind.dtype).fill_(value)


def value_of(path: Path) -> float:
    found = load_file(path / WEIGHTS_FILE)
    values = {float(value) for tensor in found.values() for value in tensor.reshape(-1)}
    assert len(values) == 1, f"torn: {values}"
    return values.pop()


def names(root: Path) -> list[str]:
    """What lies visible under a root."""
    return sorted(name for name in os.listdir(root) if not name.startswith("."))


WORDS = {f"words.{index}": torch.Size([32, 16]) for index in range(8)}
