"""A reader in a process of its own: `python -m tests.weights.reading_process ROOT LAST`.

Maps the newest version again and again until it has seen LAST. Every tensor of version v is full of v, so any other
value is a torn read. Prints how many versions it read, and how often one was gone before it could be opened.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors import safe_open

from flowrl.weights.store import WeightStore


def main(root: Path, last: int) -> None:
    torch.set_num_threads(1)
    store, seen, gone = WeightStore(root, 2), set(), 0
    print("reading", flush=True)
    while last not in seen:
        latest = store.latest()
        if latest is None:
            continue
        try:
            with safe_open(latest.path / "model.safetensors", framework="pt") as file:
                names = set(file.keys())
                values = {float(value) for name in names for value in file.get_tensor(name).unique()}
            assert (latest.path / "config.json").exists() or not latest.path.exists()
        except FileNotFoundError:
            gone += 1
            continue
        assert len(names) == 8 and values == {float(latest.version)}, f"torn: v{latest.version} holds {values}"
        assert latest.version >= max(seen, default=0), f"version {latest.version} after {max(seen)}"
        seen.add(latest.version)
    print(len(seen), gone)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
