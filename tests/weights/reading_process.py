"""A reader in a process of its own: `python -m tests.weights.reading_process WAY ROOT LAST`.

Reads the newest version again and again until it has seen LAST: `mapped`, as safetensors maps it, `read`, into tensors
in place, or `kept`, the same out of mappings that stay, as the embedded engine does. Every tensor of version v is full
of v, so any other value is a torn read. Prints how often it read, how many versions, how often one was gone before it
could be opened, and how often it had a mapping that had stayed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flowrl.weights.loading import Loader, load_in_place
from flowrl.weights.mappings import Mappings
from flowrl.weights.store import WeightStore, reading
from tests.weights.versions import WORDS

TENSORS = {name: torch.zeros(shape) for name, shape in WORDS.items()}


def values_mapped(path: Path) -> set[float]:
    with reading(path), safe_open(path / "model.safetensors", framework="pt") as file:
        return {float(value) for name in WORDS for value in file.get_tensor(name).unique()}


def values_read(path: Path) -> set[float]:
    load_in_place(TENSORS, path)
    return {float(value) for tensor in TENSORS.values() for value in tensor.unique()}


class CountingMappings(Mappings):
    num_found = 0

    def of(self, fd: int, directory: Path) -> Any:
        found = super().of(fd, directory)
        self.num_found += found is not None
        return found


LOADER = Loader(TENSORS)
LOADER._mappings = KEPT = CountingMappings()


def values_kept(path: Path) -> set[float]:
    LOADER.load(path)
    return {float(value) for tensor in TENSORS.values() for value in tensor.unique()}


def main(way: str, root: Path, last: int) -> None:
    torch.set_num_threads(1)
    values_of = {"mapped": values_mapped, "read": values_read, "kept": values_kept}[way]
    store, seen, times, gone = WeightStore(root, 2), set[int](), 0, 0
    print("reading", flush=True)
    while last not in seen:
        latest = store.latest()
        if latest is None:
            continue
        try:
            values = values_of(latest.path)
        except FileNotFoundError:
            gone += 1
            continue
        times += 1
        assert values == {float(latest.version)}, f"torn: v{latest.version} holds {values}"
        assert latest.version >= max(seen, default=0), f"version {latest.version} after {max(seen)}"
        seen.add(latest.version)
    print(times, len(seen), gone, KEPT.num_found)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
