"""Draws a sweep: a picture for each thing that one asks of it, against one axis, seeds as dots around their mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowrl.report.sweep_table import Measure, PointRow, SweepTable, is_seed, ordered, percent, spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#2563eb", "#ea580c", "#0d9488", "#7c3aed", "#dc2626", "#65a30d", "#db2777", "#64748b")
QUIET = "#64748b"
SIZE = (7.2, 4.4)
MOST_LINES = 8
LEGEND = "A dot is a point, one for each seed; the line is their mean, the band goes from the least to the most."


def choose_axis(table: SweepTable, wanted: str | None) -> str:
    """The field to draw against: the first that varies and is no seed. Raises ValueError for one that does not vary."""
    if wanted is not None and wanted not in table.fields:
        known = ", ".join(table.fields) or "none"
        raise ValueError(f"--x: {wanted!r}; does not vary in this sweep; what does: {known}")
    chosen = next((field for field in table.fields if not is_seed(field)), None)
    return wanted or chosen or next(iter(table.fields), "point")


def draw_sweep(table: SweepTable, axis: str, folder: Path) -> dict[str, Path]:
    """Writes the pictures and says where each is, by name. Those without data are left out."""
    import matplotlib

    matplotlib.use("Agg")
    pictures: dict[str, Callable[[Axes], bool]] = {
        "accuracy": lambda axes: _against(
            axes, table, axis, "accuracy_after", "Accuracy after training", "held-out accuracy"
        ),
        "reward": lambda axes: _against(
            axes, table, axis, "reward_final", "Reward at the end", "mean reward, last tenth of updates"
        ),
        "time_to_reward": lambda axes: _time_to_reward(axes, table, axis),
        "throughput": lambda axes: _from_zero(
            axes, table, axis, "tokens_per_s", "Throughput", "tokens trained per second"
        ),
        "idle": lambda axes: _idle(axes, table, axis),
        "curves": lambda axes: _curves(axes, table, axis),
    }
    return {
        name: path
        for name, panel in pictures.items()
        if _save(panel, path := folder / f"{name}.png")
    }  # fmt: skip


def _save(panel: Callable[[Axes], bool], path: Path) -> bool:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=SIZE, layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    has_data = panel(axes)
    if has_data:
        figure.savefig(path, dpi=110)
    else:
        path.unlink(missing_ok=True)
    pyplot.close(figure)
    return has_data


def _lines(table: SweepTable, axis: str) -> dict[str, list[PointRow]]:
    """The rows of each line: what else varies but seeds, as its label; one line without a label if nothing does."""
    others = [field for field in table.fields if field != axis and not is_seed(field)]
    lines: dict[str, list[PointRow]] = {}
    for row in table.compared():
        label = ", ".join(f"{field} = {row.value(field)}" for field in others)
        lines.setdefault(label, []).append(row)
    return dict(list(lines.items())[:MOST_LINES])


def _against(axes: Axes, table: SweepTable, axis: str, measure: str, title: str, ylabel: str) -> bool:
    axes.set(title=title, ylabel=ylabel)
    lines = _lines(table, axis)
    drawn = [
        _line(axes, table, axis, rows, table.measures[measure], COLOURS[index], label)
        for index, (label, rows) in enumerate(lines.items())
    ]
    return _finish(axes, table, axis, any(drawn), has_legend=len(lines) > 1)


def _time_to_reward(axes: Axes, table: SweepTable, axis: str) -> bool:
    if table.reward is None:
        return False
    missed = [row for row in table.compared() if row.figures and row.figures.seconds_to(table.reward) is None]
    note = f" ({len(missed)} of {len(table.compared())} points never reached it)" if missed else ""
    title = f"Time to a reward of {table.reward:.3g}{note}"
    return _from_zero(axes, table, axis, "seconds_to_reward", title, "seconds since the first update began")


def _from_zero(axes: Axes, table: SweepTable, axis: str, measure: str, title: str, ylabel: str) -> bool:
    """What is compared as a ratio: twice as high is twice as much."""
    has_data = _against(axes, table, axis, measure, title, ylabel)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:,.0f}" if axes.get_ylim()[1] >= 10 else "{x:g}")
    return has_data


def _idle(axes: Axes, table: SweepTable, axis: str) -> bool:
    """By stage; what else varies is averaged over, beside seeds."""
    axes.set(title="Idle share by stage", ylabel="% of training time")
    rows = table.compared()
    drawn = [
        _line(axes, table, axis, rows, percent(table.measures[f"idle_{stage}"]), COLOURS[index], stage)
        for index, stage in enumerate(table.stages[: len(COLOURS)])
    ]
    axes.set_ylim(bottom=0)
    return _finish(axes, table, axis, any(drawn), has_legend=True)


def _curves(axes: Axes, table: SweepTable, axis: str) -> bool:
    """Reward over time, a line a point, coloured by its place on the axis."""
    axes.set(
        title="Reward over time", xlabel="seconds since the first update began", ylabel="reward, mean of 10 updates"
    )
    places = ordered([row.value(axis) for row in table.compared()])
    labelled: set[str] = set()
    for row in table.compared():
        assert row.figures is not None, "compared rows have figures"
        place = row.value(axis)
        label = f"{axis} = {place}" if place not in labelled else None
        labelled.add(place)
        colour = COLOURS[places.index(place) % len(COLOURS)]
        axes.plot(row.figures.reward.t, row.figures.reward.value, color=colour, linewidth=1.1, alpha=0.8, label=label)
    if labelled:
        axes.legend(frameon=False, fontsize=8)
    return bool(labelled)


def _line(
    axes: Axes, table: SweepTable, axis: str, rows: Sequence[PointRow], measure: Measure, colour: str, label: str
) -> bool:
    """Dots for points, a line through their means, a band from the least to the most."""
    places = ordered([row.value(axis) for row in table.compared()])
    found = [(x, spread([row for row in rows if row.value(axis) == place], measure)) for x, place in enumerate(places)]
    found = [(x, here) for x, here in found if len(here.values)]
    if not found:
        return False
    x = np.array([place for place, _ in found])
    means = np.array([here.values.mean() for _, here in found])
    axes.plot(x, means, color=colour, linewidth=1.8, label=label or None)
    lows, highs = [here.values.min() for _, here in found], [here.values.max() for _, here in found]
    axes.fill_between(x, lows, highs, color=colour, alpha=0.12, linewidth=0)
    for place, here in found:
        axes.scatter(np.full(len(here.values), place), here.values, color=colour, s=22, zorder=3, linewidth=0)
    return True


def _finish(axes: Axes, table: SweepTable, axis: str, has_data: bool, has_legend: bool) -> bool:
    places = ordered([row.value(axis) for row in table.compared()])
    axes.set_xticks(range(len(places)), [place[:24] for place in places])
    axes.set_xlim(-0.4, max(0.4, len(places) - 0.6))
    axes.set_xlabel(axis)
    axes.margins(y=0.12)
    if has_legend and has_data:
        axes.legend(frameon=False, fontsize=9)
    return has_data
