"""What became of a sweep's points, as rows: each point's own figures, and their spread over seeds."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from flowrl.report.point_figures import PointFigures
from flowrl.sweep.axes import Point
from flowrl.sweep.directory import Outcome, Plan, SweepDirectory

REACHED_BY_ALL = 0.9
"""Without a reward named, the time to this share of the best reward that the weakest point reached."""


@dataclass(frozen=True, kw_only=True)
class PointRow:
    """outcome: None for a point that is waiting, running or was interrupted. figures: None before its run began."""

    point: Point
    outcome: Outcome | None
    figures: PointFigures | None

    @property
    def state(self) -> str:
        return self.outcome.state.value if self.outcome is not None else "not done"

    def value(self, field: str) -> str:
        return dict(self.point.settings).get(field, "")


Measure = Callable[[PointFigures], float | None]
MEASURES: dict[str, Measure] = {
    "accuracy_before": lambda figures: figures.accuracy_before,
    "accuracy_after": lambda figures: figures.accuracy_after,
    "reward_final": lambda figures: figures.reward_final,
    "training_s": lambda figures: figures.training_s,
    "tokens_per_s": lambda figures: figures.tokens_per_s,
    "mean_staleness": lambda figures: figures.mean_staleness,
    "max_staleness": lambda figures: figures.max_staleness,
}


@dataclass(frozen=True)
class SweepTable:
    """fields: that vary, as in the plan. reward: that `seconds_to_reward` counts to, None if no point has one."""

    plan: Plan
    rows: Sequence[PointRow]
    fields: Sequence[str]
    reward: float | None

    @property
    def stages(self) -> list[str]:
        """Whose idle share is known of any point: rollout and train first."""
        found = dict.fromkeys(stage for row in self.rows if row.figures is not None for stage in row.figures.idle)
        return sorted(found, key=lambda stage: (stage not in ("rollout", "train"), stage))

    @property
    def measures(self) -> dict[str, Measure]:
        idle = {f"idle_{stage}": partial(_idle_of, stage) for stage in self.stages}
        reward = self.reward
        if reward is None:
            return {**MEASURES, **idle}
        return {**MEASURES, "seconds_to_reward": lambda figures: figures.seconds_to(reward), **idle}

    def compared(self) -> list[PointRow]:
        """The points that ran to their end: what others left would be compared with more than it is."""
        return [row for row in self.rows if row.state == "finished" and row.figures is not None]


def read_sweep(path: Path, reward: float | None) -> SweepTable:
    """Raises ValueError if there is no sweep."""
    directory = SweepDirectory(path)
    plan = directory.read_plan()
    if plan is None:
        raise ValueError(f"sweep: {str(path)!r}; has no sweep.json")
    rows = []
    for point in plan.points:
        run = directory.run_of(point)
        figures = PointFigures.read(run) if run.is_dir() else None
        rows.append(PointRow(point=point, outcome=directory.outcome(point), figures=figures))
    return SweepTable(plan, rows, plan.varying, reward if reward is not None else _common_reward(rows))


def write_csv(table: SweepTable, path: Path) -> None:
    """A line a point, every setting a column; what is not known is empty."""
    fields = list(dict.fromkeys(field for row in table.rows for field, _ in row.point.settings))
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["point", *fields, "state", "wall_s", "updates", *table.measures])
        for row in table.rows:
            figures = row.figures
            writer.writerow([
                row.point.name,
                *(row.value(field) for field in fields),
                row.state,
                row.outcome.wall_s if row.outcome is not None else "",
                figures.updates if figures is not None else "",
                *(_cell(measure(figures) if figures is not None else None) for measure in table.measures.values()),
            ])  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """Of one measure over the seeds of a place on the axis. As text: the mean and, of several, their standard
    deviation."""

    values: np.ndarray

    def __str__(self) -> str:
        if not len(self.values):
            return ""
        mean = written(float(self.values.mean()), 3)
        deviation = float(self.values.std(ddof=1)) if len(self.values) > 1 else 0.0
        is_alike = deviation < 1e-6 * abs(float(self.values.mean()))
        return mean if len(self.values) == 1 else f"{mean} ±{0 if is_alike else written(deviation, 2)}"


def spread(rows: Sequence[PointRow], measure: Measure) -> Spread:
    found = [measure(row.figures) for row in rows if row.figures is not None]
    return Spread(np.array([value for value in found if value is not None], dtype=np.float64))


def percent(share: Measure) -> Measure:
    def measure(figures: PointFigures) -> float | None:
        value = share(figures)
        return None if value is None else 100 * value

    return measure


def is_seed(field: str) -> bool:
    return field.rpartition(".")[2] == "seed"


def ordered(values: Sequence[str]) -> list[str]:
    """Different ones; numbers by size, anything else as it came."""
    different = list(dict.fromkeys(values))
    try:
        return sorted(different, key=float)
    except ValueError:
        return different


def written(value: float | None, digits: int = 4) -> str:
    """So many digits that matter; at least all before the point. Empty for what is not known."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def _idle_of(stage: str, figures: PointFigures) -> float | None:
    return figures.idle.get(stage)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"


def _common_reward(rows: Sequence[PointRow]) -> float | None:
    """Rounded down to what a person would name. None where rewards are not above 0: then it must be named."""
    best = [
        float(row.figures.reward.value.max())
        for row in rows
        if row.state == "finished" and row.figures is not None and len(row.figures.reward)
    ]
    if not best:
        return None
    target = REACHED_BY_ALL * min(best)
    if target <= 0:
        return None
    return math.floor(target * 100) / 100 if target >= 0.1 else target
