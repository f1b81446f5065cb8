"""How many workers of a kind a node is to have while it runs: a file in the run's directory, read when it changes.

    {"rollout": {"0": 3, "1": 2}}        by kind and node; what is not named stays as it was planned

Written by whoever operates the run, whole, by one rename.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec

WANTED_FILE = "workers.json"
_LOOK_S = 1.0
_decode = msgspec.json.Decoder(dict[str, dict[str, int]]).decode


def want(run_dir: Path, kind: str, node: int, count: int) -> None:
    path = run_dir / WANTED_FILE
    wanted = read(run_dir)
    wanted.setdefault(kind, {})[str(node)] = count
    fresh = path.with_name(f".{path.name}.new")
    fresh.write_bytes(msgspec.json.encode(wanted))
    fresh.replace(path)


def read(run_dir: Path) -> dict[str, dict[str, int]]:
    try:
        return _decode((run_dir / WANTED_FILE).read_bytes())
    except FileNotFoundError:
        return {}


class WantedWorkers:
    """Of one node, in its controller's loop."""

    def __init__(self, run_dir: Path, node: int) -> None:
        self._run_dir = run_dir
        self._node = str(node)
        self._looked_at = -_LOOK_S
        self._seen = 0

    def news(self) -> dict[str, int]:
        """Kind -> count, of everything, if the file has changed since the last time; looks once a second."""
        now = time.monotonic()
        if now - self._looked_at < _LOOK_S:
            return {}
        self._looked_at = now
        try:
            changed = (self._run_dir / WANTED_FILE).stat().st_mtime_ns
        except FileNotFoundError:
            return {}
        if changed == self._seen:
            return {}
        self._seen = changed
        return {kind: counts[self._node] for kind, counts in read(self._run_dir).items() if self._node in counts}
