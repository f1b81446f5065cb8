"""From a published version into the tensors of a model that is being served, in place.

Everything is compared before anything is overwritten. Bytes are read straight into the parameters where dtype and
device allow it: mapping the file would fault every page of it in anew for each version.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

from flowrl.weights.adapters import is_adapter, merge_in_place
from flowrl.weights.names import extents_on_disk
from flowrl.weights.store import reading
from flowrl.weights.tensorfile import Slot, read_slots

_CHUNK_BYTES = 4 << 20
_NUM_THREADS = min(4, len(os.sched_getaffinity(0)))


class Place(NamedTuple):
    """Elements of a module's tensor, all in a row, and the bytes [begin, end) of a file that they are, in what dtype.
    `name` is the file's."""

    name: str
    target: torch.Tensor
    begin: int
    end: int
    dtype: torch.dtype


class _Copy(NamedTuple):
    """A part of a place, in one of the files."""

    target: torch.Tensor
    file: Path
    begin: int
    dtype: torch.dtype


@torch.no_grad()
def load_in_place(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Overwrites `tensors`, a state dict with `keep_vars=True`, by the weights of the directory `path`.

    A directory of adapters is merged into a model that has its checkpoint's weights, see `adapters.py`. Raises
    ValueError, with nothing overwritten, if names or shapes are not the same on both sides or a file is cut short;
    FileNotFoundError if the version has gone.
    """
    with reading(path):
        if is_adapter(path):
            return merge_in_place(tensors, path)
        copies = _copies(tensors, path)
        opened = {file: os.open(file, os.O_RDONLY | os.O_CLOEXEC) for file in {copy.file for copy in copies}}
        try:
            # The kernel copies; threads of ours only wait for it, and large models come in at the memory's speed.
            with ThreadPoolExecutor(_NUM_THREADS) as threads:
                list(threads.map(lambda copy: _read(opened[copy.file], copy), copies))
        finally:
            for fd in opened.values():
                os.close(fd)


def places(tensors: Mapping[str, torch.Tensor], slots: Mapping[str, Slot], where: object) -> list[Place]:
    """Where the tensors of a version belong. slots: of all its files. Raises ValueError if names or shapes are not the
    same on both sides."""
    extents = extents_on_disk(tensors, {name: slot.kind for name, slot in slots.items()}, where)
    scattered = [name for name in extents if not tensors[name].is_contiguous()]
    if scattered:
        raise ValueError(f"weights: {scattered[0]} does not lie in one piece in this model")
    unknown = slots.keys() - {extent.name for found in extents.values() for extent in found} - tensors.keys()
    if unknown:
        raise ValueError(f"weights: {where} has {', '.join(sorted(unknown)[:5])}, which the model does not know")
    return [
        _place(tensors[name], extent.name, extent.begin, slots[extent.name])
        for name, found in extents.items()
        for extent in found
    ]


def _place(tensor: torch.Tensor, name: str, first: int, slot: Slot) -> Place:
    """Of a tensor whose elements from `first` on are the one of that name."""
    flat = tensor.detach().view(-1)[first : first + slot.kind.shape.numel()]
    return Place(name, flat, slot.begin, slot.begin + slot.kind.num_bytes, slot.kind.dtype)


def _copies(tensors: Mapping[str, torch.Tensor], path: Path) -> list[_Copy]:
    files = {file: read_slots(file) for file in sorted(path.glob("*.safetensors"))}
    for file, slots in files.items():
        end = max((slot.begin + slot.kind.num_bytes for slot in slots.values()), default=0)
        if file.stat().st_size < end:
            raise ValueError(f"weights: {file} has {file.stat().st_size} bytes, and {end} by its header")
    file_of = {name: file for file, slots in files.items() for name in slots}
    every = {name: slot for slots in files.values() for name, slot in slots.items()}
    return [copy for place in places(tensors, every, path) for copy in _chunks(place, file_of[place.name])]


def _chunks(place: Place, file: Path) -> Iterator[_Copy]:
    itemsize = place.dtype.itemsize
    each = _CHUNK_BYTES // itemsize
    for begin in range(0, len(place.target), each):
        yield _Copy(place.target[begin : begin + each], file, place.begin + begin * itemsize, place.dtype)


@torch.no_grad()
def _read(fd: int, copy: _Copy) -> None:
    target = copy.target
    if target.dtype == copy.dtype and target.device.type == "cpu":
        return _fill(fd, target.view(torch.uint8), copy.begin)
    staging = torch.empty(len(target), dtype=copy.dtype)
    _fill(fd, staging.view(torch.uint8), copy.begin)
    target.copy_(staging)


def _fill(fd: int, target: torch.Tensor, begin: int) -> None:
    """All of `target`, uint8, from the file's byte `begin` on. The kernel gives at most 2 GiB a call."""
    view = target.numpy().data
    while view:
        count = os.preadv(fd, [view], begin)
        assert count, "the file ends before its header says; it was checked a moment ago"
        view, begin = view[count:], begin + count
