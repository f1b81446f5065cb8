"""Reads `metrics.jsonl`, `summary.json` and `samples.jsonl` of a run. Computes nothing but series."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

NOT_METRICS = ("t", "step", "node", "worker")


@dataclass(frozen=True)
class Series:
    """One metric: seconds since the start, step (nan where the line has none), value; in order of time."""

    t: np.ndarray
    step: np.ndarray
    value: np.ndarray

    def __len__(self) -> int:
        return len(self.value)


@dataclass(frozen=True)
class RunRecord:
    """summary is empty for a run that has not ended. recipe: as the run resolved it."""

    name: str
    lines: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any]
    recipe: str = ""
    samples_path: Path | None = None

    @classmethod
    def read(cls, run: Path) -> RunRecord:
        """Raises ValueError if there is no such directory. Files that are missing count as empty."""
        if not run.is_dir():
            raise ValueError(f"run: {str(run)!r}; no such directory")
        summary, recipe = run / "summary.json", run / "recipe.yaml"
        return cls(
            name=run.resolve().name,
            lines=_json_lines(run / "metrics.jsonl"),
            summary=json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {},
            recipe=recipe.read_text(encoding="utf-8") if recipe.is_file() else "",
            samples_path=run / "samples.jsonl",
        )

    def last_samples(self, most: int) -> list[dict[str, Any]]:
        """Of those written for people, the newest last."""
        return _json_lines(self.samples_path)[-most:] if self.samples_path is not None else []

    def names(self, prefix: str) -> list[str]:
        """Metrics that begin so, in order."""
        return sorted({name for line in self.lines for name in line if name.startswith(prefix)})

    def series(self, name: str) -> Series:
        found = [line for line in self.lines if isinstance(line.get(name), int | float)]
        found.sort(key=lambda line: line["t"])
        columns = [[line["t"], np.nan if line.get("step") is None else line["step"], line[name]] for line in found]
        t, step, value = np.array(columns, dtype=np.float64).reshape(-1, 3).T
        return Series(t, step, value)

    def first_series(self, *names: str) -> Series:
        """That of the first name that has one."""
        return next((series for name in names if len(series := self.series(name))), self.series(names[0]))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """Whole lines only: a run that is still writing, or was killed, may end within one."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.split("\n") if line]
