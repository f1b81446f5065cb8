"""The safetensors file of a version: its layout, computed once, and writing tensors straight into place.

No copy of the whole stands between: each tensor is cast while it is copied into the mapped file.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

DTYPE_CODES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the file; `begin` counts from its first byte."""

    shape: torch.Size
    begin: int
    num_bytes: int


class TensorFileLayout:
    """Header and offsets for tensors of these names and shapes, all of one dtype. Alignment is 8 bytes."""

    def __init__(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype) -> None:
        if dtype not in DTYPE_CODES:
            raise ValueError(f"model.dtype: {dtype}; must be one of {', '.join(map(str, DTYPE_CODES))}")
        self.dtype = dtype
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        extents = {}
        for name, shape in shapes.items():
            num_bytes = shape.numel() * dtype.itemsize
            extents[name] = (end, num_bytes)
            entries[name] = {"dtype": DTYPE_CODES[dtype], "shape": list(shape), "data_offsets": [end, end + num_bytes]}
            end += num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.num_bytes = len(self.header) + end
        self.slots = {
            name: Slot(shapes[name], len(self.header) + begin, size) for name, (begin, size) in extents.items()
        }


def write_tensors(path: Path, layout: TensorFileLayout, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Creates `path`, which must not exist, and leaves it read-only.

    `tensors` is consumed one by one, so that a gathered tensor lives no longer than its copy takes. Raises OSError when
    there is no room, before anything is written.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        # Allocated first: writing to a mapping of a file system that has run full would be a signal, not an error.
        os.posix_fallocate(fd, 0, layout.num_bytes)
        # Unmapped with the last tensor over it: closing it by hand would, after an error, hide that error.
        mapped = mmap.mmap(fd, layout.num_bytes)
        mapped[: len(layout.header)] = layout.header
        _copy(torch.frombuffer(mapped, dtype=torch.uint8), layout, tensors)
        os.fchmod(fd, 0o444)
        os.fsync(fd)
    finally:
        os.close(fd)


def _copy(file: torch.Tensor, layout: TensorFileLayout, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    missing = set(layout.slots)
    for name, tensor in tensors:
        slot = layout.slots[name]
        target = file[slot.begin : slot.begin + slot.num_bytes].view(layout.dtype).view(slot.shape)
        target.copy_(tensor.detach())
        missing.remove(name)
    assert not missing, f"never written: {sorted(missing)}"


def read_shapes(path: Path) -> dict[str, torch.Size]:
    """Names and shapes in the header of one safetensors file."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        entries = json.loads(file.read(length))
    return {name: torch.Size(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
