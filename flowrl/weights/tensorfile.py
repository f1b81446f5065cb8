"""The safetensors file of a version: where each tensor lies in it. Computed once, the same for every version.

Knows names, shapes and dtypes; who writes the bytes is `writing.py`'s matter.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import torch

WEIGHTS_FILE = "model.safetensors"
DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}


@dataclass(frozen=True)
class Kind:
    """Shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class Slot:
    """Where a tensor lies in the file; `begin` counts from its first byte."""

    kind: Kind
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.kind.num_bytes


class TensorFileLayout:
    """Header and offsets for these tensors, in the order given, in a file of that name. Alignment is that of each
    dtype, provided that wider ones come first."""

    def __init__(self, kinds: Mapping[str, Kind], file_name: str = WEIGHTS_FILE) -> None:
        self.file_name = file_name
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        begins = {}
        for name, kind in kinds.items():
            assert end % kind.dtype.itemsize == 0, f"{name}: wider dtypes come first"
            begins[name] = end
            code = DTYPE_CODES[kind.dtype]
            entries[name] = {"dtype": code, "shape": list(kind.shape), "data_offsets": [end, end + kind.num_bytes]}
            end += kind.num_bytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = struct.pack("<Q", len(text)) + text
        self.num_bytes = len(self.header) + end
        self.slots = {name: Slot(kinds[name], len(self.header) + begin) for name, begin in begins.items()}


def read_slots(path: Path) -> dict[str, Slot]:
    """What the header of one safetensors file says. Raises ValueError for a dtype that is not known here."""
    with path.open("rb") as file:
        return slots_of(read_header(file), str(path))


def read_header(file: BinaryIO | FileIO) -> bytes:
    """From the beginning of an open file, its length included."""
    length: bytes = file.read(8)
    return length + file.read(int.from_bytes(length, "little"))


def slots_of(header: bytes, where: str = "weights") -> dict[str, Slot]:
    """What a header says, its length included. Raises ValueError for a dtype that is not known here."""
    slots = {}
    for name, entry in json.loads(header[8:]).items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{where}: {name!r} has dtype {entry['dtype']}; must be one of {', '.join(DTYPES)}")
        kind = Kind(torch.Size(entry["shape"]), DTYPES[entry["dtype"]])
        slots[name] = Slot(kind, len(header) + entry["data_offsets"][0])
    return slots
