"""What a trainer rank consumed, in order, and what its parameters were after each update.

    record/rank0.life0      frames: 4 bytes of length, then a tagged msgpack struct
        Beginning           once
        Consumed            for every call that accumulates: rows as they came, so that micro-batches are the same
        Updated             after every step: a digest of each parameter's shard
    record/step_0/          the trainer before the first update, where that is not just the model of the recipe

A life is what lies between two starts of a run; where it had to go back to a checkpoint, the later life counts.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

import msgspec
import torch
import xxhash

from flowrl.trainer.parcel import Parcel
from transfer_queue.rows import Rows

RECORD_DIR = "record"
_LENGTH = struct.Struct("<I")


class Beginning(msgspec.Struct, frozen=True, tag=True):
    """step: of the first update. versions: of packages, which must be the same for the same bits."""

    rank: int
    world_size: int
    life: int
    step: int
    device: str
    threads: int
    versions: dict[str, str]


class Consumed(msgspec.Struct, frozen=True, tag=True):
    update: int
    parcel: Parcel


class Updated(msgspec.Struct, frozen=True, tag=True):
    """digests: by the name of the parameter, of this rank's shard."""

    update: int
    digests: dict[str, str]


Entry = Beginning | Consumed | Updated
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


class RecordWriter:
    """A context manager. What an update consumed is in the file when the update is closed."""

    def __init__(self, directory: Path, beginning: Beginning) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._file = (directory / f"rank{beginning.rank}.life{beginning.life}").open("wb")
        self._write(beginning)

    def consumed(self, update: int, rows: Rows) -> None:
        self._write(Consumed(update, Parcel.of(rows)))

    def updated(self, update: int, parameters: Mapping[str, torch.Tensor]) -> None:
        self._write(Updated(update, digests(parameters)))
        self._file.flush()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _write(self, entry: Entry) -> None:
        content = _encode(entry)
        self._file.write(_LENGTH.pack(len(content)))
        self._file.write(content)


def digests(parameters: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Of the bytes of each tensor; of a sharded one, of the shard that is here."""
    return {name: _digest(tensor) for name, tensor in parameters.items()}


def _digest(tensor: torch.Tensor) -> str:
    local = tensor.detach()
    if hasattr(local, "to_local"):
        local = local.to_local()
    flat = local.cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return xxhash.xxh3_64_hexdigest(flat.data)


def read_entries(path: Path) -> Iterator[Entry]:
    """Every whole entry; a last one that a killed writer left unfinished is left out."""
    with path.open("rb") as file:
        while len(head := file.read(_LENGTH.size)) == _LENGTH.size:
            (length,) = _LENGTH.unpack(head)
            content = file.read(length)
            if len(content) < length:
                return
            yield _decode(content)
