"""From a published version into the tensors of a model that is being served, in place.

Everything is compared before anything is overwritten. Bytes go straight into the parameters where dtype and device
allow it, from a mapping that outlives the version (`mappings.py`) or else by reading the file: to map it for each
version would fault every page of it in anew.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from flowrl.weights.adapters import is_adapter, merge_in_place
from flowrl.weights.mappings import Mappings
from flowrl.weights.names import extents_on_disk
from flowrl.weights.store import reading
from flowrl.weights.tensorfile import Slot, read_header, slots_of

_CHUNK_BYTES = 4 << 20
_NUM_THREADS = min(8, len(os.sched_getaffinity(0)))
_THREAD_BYTES = 64 << 20
"""For each of which a further thread is worth its start: in its first milliseconds it shares its starter's core."""


class Place(NamedTuple):
    """Elements of a module's tensor, all in a row, and the bytes [begin, end) of a file that they are, in what dtype.
    `name` is the file's."""

    name: str
    target: torch.Tensor
    begin: int
    end: int
    dtype: torch.dtype


class _Copy(NamedTuple):
    """A part of a place; `file` is a number. data: the target's own bytes, where the file's come straight there."""

    target: torch.Tensor
    data: np.ndarray | None
    file: int
    begin: int
    dtype: torch.dtype

    @classmethod
    def of(cls, target: torch.Tensor, file: int, begin: int, dtype: torch.dtype) -> _Copy:
        is_straight = target.dtype == dtype and target.device.type == "cpu"
        return cls(target, target.view(torch.uint8).numpy() if is_straight else None, file, begin, dtype)


class _Source(NamedTuple):
    """An open file, and its bytes if they are mapped."""

    fd: int
    mapped: np.ndarray | None

    def fill(self, target: np.ndarray, begin: int) -> None:
        """All of `target`, uint8, from the file's byte `begin` on."""
        if self.mapped is not None:
            return np.copyto(target, self.mapped[begin : begin + len(target)])
        rest = target.data
        while rest:  # the kernel gives at most 2 GiB a call
            count = os.preadv(self.fd, [rest], begin)
            assert count, "the file ends before its header says; it was checked a moment ago"
            rest, begin = rest[count:], begin + count


class Loader:
    """Loads versions into one model. What is the same for all of them is worked out once."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], keeps_mappings: bool = True) -> None:
        """tensors: a state dict with `keep_vars=True`. keeps_mappings: of the writer's buffers, for later versions."""
        self._tensors = tensors
        self._headers: list[bytes] = []
        self._ends: list[int] = []
        self._copies: list[_Copy] = []
        self._mappings = Mappings() if keeps_mappings else None

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Overwrites the tensors by the weights of the directory `path`; one of adapters is merged into a model that
        has its checkpoint's weights, see `adapters.py`.

        Raises ValueError, with nothing overwritten, if names or shapes are not the same on both sides or a file is cut
        short; FileNotFoundError if the version has gone.
        """
        with reading(path) as fds:
            if is_adapter(path):
                return merge_in_place(self._tensors, path)
            self._read_headers([_header_of(fd) for fd in fds], path)
            for fd, end in zip(fds, self._ends, strict=True):
                if (size := os.fstat(fd).st_size) < end:
                    name = os.readlink(f"/proc/self/fd/{fd}")
                    raise ValueError(f"weights: {name} has {size} bytes, and {end} by its header")
            sources = [_Source(fd, self._mapped(fd, path)) for fd in fds]
            _load_each(self._copies, sources, sum(self._ends))
            for device in {copy.target.device for copy in self._copies if copy.target.is_cuda}:
                torch.cuda.default_stream(device).synchronize()  # of the helping threads
                torch.cuda.current_stream(device).synchronize()

    def _mapped(self, fd: int, path: Path) -> np.ndarray | None:
        return None if self._mappings is None else self._mappings.of(fd, path)

    def _read_headers(self, headers: list[bytes], path: Path) -> None:
        if headers == self._headers:
            return
        slots = [slots_of(header, str(path)) for header in headers]
        file_of = {name: number for number, found in enumerate(slots) for name in found}
        every = {name: slot for found in slots for name, slot in found.items()}
        found = places(self._tensors, every, path)
        self._copies = [copy for place in found for copy in _chunks(place, file_of[place.name])]
        self._ends = [max((slot.end for slot in found.values()), default=0) for found in slots]
        self._headers = headers


def _header_of(fd: int) -> bytes:
    with open(fd, "rb", buffering=0, closefd=False) as file:
        return read_header(file)


def load_in_place(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """As `Loader.load`, once."""
    Loader(tensors, keeps_mappings=False).load(path)


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
    return Place(name, flat, slot.begin, slot.end, slot.kind.dtype)


def _chunks(place: Place, file: int) -> Iterator[_Copy]:
    itemsize = place.dtype.itemsize
    each = _CHUNK_BYTES // itemsize
    for begin in range(0, len(place.target), each):
        yield _Copy.of(place.target[begin : begin + each], file, place.begin + begin * itemsize, place.dtype)


def _load_each(copies: Sequence[_Copy], sources: Sequence[_Source], num_bytes: int) -> None:
    """Threads do not hold one another up in a copy, so that large models come in at the memory's speed. Each takes the
    next copy that nobody has taken: to hand them out one by one takes longer than most of them do."""
    rest = iter(copies)  # of a sequence: what `next` gives to one thread it gives to no other

    def load() -> None:
        for copy in rest:
            _load(sources[copy.file], copy)

    helpers = min(_NUM_THREADS - 1, num_bytes // _THREAD_BYTES)
    if not helpers:
        return load()
    with ThreadPoolExecutor(helpers) as threads:
        helping = [threads.submit(load) for _ in range(helpers)]
        load()
        for helped in helping:
            helped.result()


def _load(source: _Source, copy: _Copy) -> None:
    if copy.data is not None:
        return source.fill(copy.data, copy.begin)
    target = copy.target
    # To a GPU from pinned memory, which torch keeps and hands out again once the copy is done; there it is cast.
    staging = torch.empty(len(target), dtype=copy.dtype, pin_memory=target.is_cuda)
    source.fill(staging.view(torch.uint8).numpy(), copy.begin)
    target.copy_(staging, non_blocking=target.is_cuda)
