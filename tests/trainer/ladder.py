"""What ranks of worlds of 1, 2 and 4 found, each continuing the checkpoint of the one before."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np

from tests.trainer.architectures import make_architectures
from tests.trainer.ladder_process import run_rung
from tests.trainer.ranks import run_ranks

SIZES = (1, 2, 4)


class Ladder:
    """Each rung is climbed when first asked for, after those below it."""

    def __init__(self, directory: Path) -> None:
        self.models = make_architectures(directory / "models")
        self._directory = directory

    def rung(self, size: int) -> Path:
        path = self._directory / str(size)
        if not path.exists():
            below = self.rung(SIZES[SIZES.index(size) - 1]) if size > SIZES[0] else None
            path.mkdir()
            run_ranks(run_rung, size, path, self.models, below)
        return path

    def arrays(self, size: int, name: str) -> list[np.ndarray]:
        """Of all ranks, in the order of the samples."""
        archives = [np.load(path) for path in sorted(self.rung(size).glob(f"{name}-?.npz"))]
        assert len(archives) == size
        return [archive[key] for archive in archives for key in archive.files]

    @cache  # noqa: B019  # there is one ladder, and it lasts as long as the tests
    def matrix(self, size: int, rank: int) -> tuple[dict[str, np.ndarray], dict[str, float]]:
        """(gradients end to end, losses) by case and cut."""
        path = self.rung(size) / f"matrix-{rank}"
        return dict(np.load(path.with_suffix(".npz"))), json.loads(path.with_suffix(".json").read_text())
