"""What a run under way has written to its `metrics.jsonl`: how far it is, and the metric that the sweep goes by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ACCURACY = "accuracy"
REWARD = "critic/score/mean"
TRAILING = 10  # values of a metric that one report averages over


class Watch:
    """step: updates done. reward, accuracy: the last seen, None before."""

    def __init__(self, metrics: Path, metric: str) -> None:
        self._path = metrics
        self._metric = metric
        self._read_bytes = 0
        self._values: list[float] = []
        self.step = 0
        self.reward: float | None = None
        self.accuracy: float | None = None

    def reports(self) -> list[tuple[int, float]]:
        """(update, metric) of the lines written since the last call; a metric is the mean of its last ten values, an
        accuracy stands for itself."""
        found: list[tuple[int, float]] = []
        for line in self._new_lines():
            step = line.get("step")
            accuracy = _accuracy(line)
            self.accuracy = self.accuracy if accuracy is None else accuracy
            value = accuracy if self._metric == ACCURACY else line.get(self._metric)
            if REWARD in line and step is not None:
                self.step, self.reward = int(step), float(line[REWARD])
            if value is not None and step is not None:
                self._values = [*self._values, float(value)][-TRAILING:]
                mean = sum(self._values) / len(self._values)
                found.append((int(step), float(value) if self._metric == ACCURACY else mean))
        return found

    def _new_lines(self) -> list[Mapping[str, Any]]:
        """Whole lines only: the rest of a line comes with the next call."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read_bytes)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read_bytes += len(whole) + len(end)
        return [json.loads(line) for line in whole.splitlines()]


def _accuracy(line: Mapping[str, Any]) -> float | None:
    return next(
        (float(value) for name, value in line.items() if name.startswith("val-core/") and "/acc/" in name), None
    )
