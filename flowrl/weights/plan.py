"""Which rank writes which bytes of a version. Pure: every rank computes the same plan, and their hashes are compared.

FSDP2 shards a tensor along its first dimension into the chunks of `torch.chunk`: the first ranks have as many rows each
as the quotient rounded up, the last may have fewer or none. In memory a chunk is one piece; so it is in the file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from flowrl.weights.names import Extent
from flowrl.weights.tensorfile import WEIGHTS_FILE, Kind, TensorFileLayout


class Piece(NamedTuple):
    """What a rank has of a module's tensor, all of it in one piece: `begin` is its first byte in the file."""

    name: str
    rows: tuple[int, int]
    kind: Kind
    begin: int

    @property
    def end(self) -> int:
        return self.begin + self.kind.num_bytes


@dataclass(frozen=True)
class Source:
    """A tensor of the module. An unsharded one is whole on every rank, and rank 0 writes it."""

    name: str
    kind: Kind
    is_sharded: bool
    begin: int


@dataclass(frozen=True)
class Plan:
    layout: TensorFileLayout
    sources: tuple[Source, ...]
    num_ranks: int

    @classmethod
    def of(
        cls,
        extents: Mapping[str, Sequence[Extent]],
        kinds: Mapping[str, Kind],
        sharded: Collection[str],
        num_ranks: int,
        file_name: str = WEIGHTS_FILE,
    ) -> Plan:
        """extents: of each module tensor, see `names.py`; kinds: its global shape and the dtype that it is served in;
        sharded: those that are sharded over the ranks; file_name: of the file that is written."""
        names = sorted(extents, key=lambda name: -kinds[name].dtype.itemsize)
        layout = TensorFileLayout(
            {extent.name: Kind(extent.shape, kinds[name].dtype) for name in names for extent in extents[name]},
            file_name,
        )
        sources = [
            Source(name, kinds[name], name in sharded, layout.slots[extents[name][0].name].begin) for name in names
        ]
        return cls(layout, tuple(sources), num_ranks)

    def pieces(self, rank: int) -> list[Piece]:
        """Without those that are empty."""
        found = []
        for source in self.sources:
            piece = _piece(source, rank, self.num_ranks)
            if piece is not None:
                found.append(piece)
        return found

    def ranges(self, ranks: Iterable[int]) -> list[tuple[int, int]]:
        """The bytes [begin, end) that these ranks write, joined where they touch. The header is rank 0's."""
        chosen = set(ranks)
        found = [(0, len(self.layout.header))] if 0 in chosen else []
        found += [(piece.begin, piece.end) for rank in chosen for piece in self.pieces(rank)]
        return joined(found)

    @cached_property
    def fingerprint(self) -> str:
        """Equal on all ranks, or nothing may be written."""
        sources = [
            (source.name, list(source.kind.shape), str(source.kind.dtype), source.is_sharded, source.begin)
            for source in self.sources
        ]
        text = json.dumps([sources, self.num_ranks]).encode() + self.layout.header
        return hashlib.sha256(text).hexdigest()[:16]


def chunk_rows(rank: int, num_rows: int, num_ranks: int) -> tuple[int, int]:
    """Rows [begin, end) of a rank, as `torch.chunk` deals them out."""
    each = -(-num_rows // num_ranks)
    return min(rank * each, num_rows), min((rank + 1) * each, num_rows)


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, and one where they touch."""
    found: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if found and found[-1][1] == begin:
            found[-1] = (found[-1][0], end)
        else:
            found.append((begin, end))
    return found


def is_sharded(name: str, tensor: torch.Tensor) -> bool:
    """Whether it is sharded along its first dimension over all ranks, the one sharding that a plan can express. Raises
    ValueError naming a tensor with any other."""
    if not isinstance(tensor, DTensor):
        return False
    placements = tensor.placements
    if len(placements) == 1 and placements[0].is_replicate():
        return False
    if len(placements) == 1 and type(placements[0]).__name__ == "Shard" and placements[0].is_shard(0):
        return True
    raise ValueError(
        f"weights: {name!r} is placed as {tuple(placements)}; only tensors sharded along dimension 0 over one mesh "
        f"dimension can be written as byte ranges"
    )


def served_dtypes(
    on_disk: Mapping[str, Kind], extents: Mapping[str, Sequence[Extent]], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """What each module tensor is served in: `dtype`, except what the disk keeps apart on purpose: whole numbers, and
    float32 in a checkpoint that is otherwise narrower."""
    kinds = {name: on_disk[found[0].name] for name, found in extents.items()}
    floats = {kind.dtype for kind in kinds.values() if kind.dtype.is_floating_point}
    is_mixed = len(floats) > 1

    def served(kind: Kind) -> torch.dtype:
        is_kept = not kind.dtype.is_floating_point or (is_mixed and kind.dtype == torch.float32)
        return kind.dtype if is_kept else dtype

    return {name: served(kind) for name, kind in kinds.items()}


def _piece(source: Source, rank: int, num_ranks: int) -> Piece | None:
    shape, dtype = source.kind.shape, source.kind.dtype
    if not source.is_sharded:
        return Piece(source.name, (0, shape[0] if shape else 1), source.kind, source.begin) if rank == 0 else None
    assert len(shape), f"{source.name}: a scalar is not sharded"
    begin, end = chunk_rows(rank, shape[0], num_ranks)
    if begin == end:
        return None
    rest = shape[1:].numel()
    kind = Kind(torch.Size((end - begin, *shape[1:])), dtype)
    return Piece(source.name, (begin, end), kind, source.begin + begin * rest * dtype.itemsize)
