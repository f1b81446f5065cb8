"""Hears what the controller hears and writes it down: `metrics.jsonl` as it happens, `summary.json` at the end.

One a node, in the controller's process. Events of rows are not its business: workers append those themselves.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from controllers.settings import Observers
from controllers.supervisor import WorkerState
from flowrl.config import Recipe
from flowrl.record.display import Display


class Recorder:
    """A later life of a run goes on where metrics.jsonl ends."""

    def __init__(self, recipe: Recipe, directory: Path, node: int, display: Display) -> None:
        self.recipe = recipe
        self.directory = directory
        self.node = node
        self.display = display
        earlier = earlier_reports(directory / "metrics.jsonl")
        self.started = time.monotonic() - max((report["t"] for report in earlier), default=0.0)
        self.metrics = (directory / "metrics.jsonl").open("a", encoding="utf-8", buffering=1)
        self.evaluations = evaluations_in(earlier)
        self.finished: dict[str, Any] = {}

    def observers(self) -> Observers:
        return Observers(
            on_report=self.on_report,
            on_worker=self.on_worker,
            on_announcement=self.on_announcement,
            on_heartbeat=lambda worker, heartbeat: self.display.waiting(worker, heartbeat.waiting_for),
            on_stall=self.display.stalled,
            on_end=self.display.ended,
        )

    def on_report(self, worker: str, metrics: Mapping[str, float], step: int | None) -> None:
        if self.node:
            return  # node 0 hears it too
        line = {"t": round(time.monotonic() - self.started, 3), "step": step, "node": self.node, "worker": worker}
        self.metrics.write(json.dumps({**line, **metrics}) + "\n")
        self.display.metrics(metrics, step)

    def on_announcement(self, topic: str, payload: Mapping[str, Any]) -> None:
        if topic == "evaluated":
            self.evaluations[int(payload["version"])] = float(payload["accuracy"])
            self.display.evaluated(int(payload["version"]), float(payload["accuracy"]), int(payload["prompts"]))
        elif topic == "trained":
            self.finished = dict(payload)

    def on_worker(self, worker: str, state: WorkerState, text: str) -> None:
        self.display.worker(worker, state, text)

    def close(self) -> dict[str, Any]:
        """Writes the summary (node 0) and returns it. What was not measured is null."""
        self.metrics.close()
        versions = sorted(self.evaluations)
        summary = {
            "name": self.recipe.run.name,
            "seed": self.recipe.train.seed,
            "staleness_bound": self.recipe.staleness.max,
            "steps": self.finished.get("steps"),
            "accuracy_before": self.evaluations[versions[0]] if versions else None,
            "accuracy_after": self.evaluations[versions[-1]] if versions else None,
            "accuracy_by_version": {str(version): self.evaluations[version] for version in versions},
            "rl_s": self.finished.get("rl_s"),
            "wall_s": round(time.monotonic() - self.started, 2),
            "max_staleness": self.finished.get("max_staleness"),
            "mean_staleness": self.finished.get("mean_staleness"),
        }
        if self.node == 0:
            temporary = self.directory / "summary.json.tmp"
            temporary.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
            temporary.rename(self.directory / "summary.json")
        return summary


def earlier_reports(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def evaluations_in(reports: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Accuracy by version."""
    return {
        int(report["eval/version"]): value
        for report in reports
        if "eval/version" in report
        for name, value in report.items()
        if name.startswith("val-core/")
    }
