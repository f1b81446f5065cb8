"""Draws `curves.png`: a run on one picture, two rows of three panels. A panel without data says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowrl.report.record import RunRecord, Series
from flowrl.report.staleness_check import Findings

if TYPE_CHECKING:
    from matplotlib.axes import Axes

REWARD, ACCURACY, QUIET, ALARM = "#2563eb", "#ea580c", "#64748b", "#dc2626"
SMOOTHING = 0.05  # share of the run that a smoothed point averages over
MOST_STAGES = 8


def draw(record: RunRecord, findings: Findings | None, path: Path) -> None:
    """Writes the picture to `path`. findings: of `staleness_check`, None for a run without an event log."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(16, 8.5), layout="constrained")
    panels: list[Callable[[Axes], bool]] = [
        lambda axis: _learning(axis, record, over_step=False),
        lambda axis: _learning(axis, record, over_step=True),
        lambda axis: _staleness(axis, findings),
        lambda axis: _response_length(axis, record),
        lambda axis: _time_by_stage(axis, record),
        lambda axis: _policy(axis, record),
    ]
    for axis, panel in zip(axes.flat, panels, strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.set_axisbelow(True)
        if not panel(axis):
            axis.text(0.5, 0.5, "no data", ha="center", va="center", color=QUIET, transform=axis.transAxes)
            axis.set(xticks=[], yticks=[])
    figure.suptitle(_title(record), fontsize=13)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _title(record: RunRecord) -> str:
    summary = record.summary
    parts = [record.name]
    if summary.get("steps") is not None:
        parts.append(f"{summary['steps']} updates")
    if summary.get("rl_s") is not None:
        parts.append(f"{summary['rl_s']:.1f} s of training")
    if summary.get("accuracy_before") is not None and summary.get("accuracy_after") is not None:
        parts.append(f"accuracy {summary['accuracy_before']:.3f} → {summary['accuracy_after']:.3f}")
    return "  ·  ".join(parts)


def _learning(axis: Axes, record: RunRecord, *, over_step: bool) -> bool:
    reward = record.first_series("critic/score/mean", "critic/rewards/mean")
    accuracy = accuracy_by_version(record)
    axis.set_title("Reward and accuracy over " + ("updates" if over_step else "time"))
    axis.set_xlabel("update" if over_step else "seconds since the start")
    if len(reward):
        x = reward.step if over_step else reward.t
        axis.plot(x, reward.value, color=REWARD, alpha=0.25, linewidth=0.8)
        axis.plot(x, smooth(reward.value), color=REWARD, linewidth=1.8, label="reward (training)")
    if len(accuracy):
        x = accuracy.step if over_step else accuracy.t
        axis.plot(
            x, accuracy.value, color=ACCURACY, marker="o", markersize=4, linewidth=1.4, label="accuracy (held out)"
        )
        for place, word in ((0, "before"), (-1, "after"))[: len(accuracy)]:
            axis.annotate(
                f"{word} {accuracy.value[place]:.3f}",
                (x[place], accuracy.value[place]),
                xytext=(8, -4) if place == 0 else (0, -16),
                ha="left" if place == 0 else "right",
                textcoords="offset points",
                color=ACCURACY,
                fontweight="bold",
            )
    if not len(reward) and not len(accuracy):
        return False
    axis.margins(y=0.08)
    axis.legend(loc="lower right", frameon=False)
    return True


def accuracy_by_version(record: RunRecord) -> Series:
    """Each version at the time when training reached it, where known: an evaluation ends later than that."""
    names = [name for name in record.names("val-core/") if "/acc/" in name]
    accuracy = record.first_series(*names, "val-core/accuracy")
    reached = {step: t for line in record.lines if (step := line.get("step")) and (t := line["t"]) and _is_update(line)}
    t = np.array([reached.get(int(step), t) for t, step in zip(accuracy.t, np.nan_to_num(accuracy.step), strict=True)])
    order = np.argsort(accuracy.step, kind="stable")
    return Series(t[order], accuracy.step[order], accuracy.value[order])


def _is_update(line: object) -> bool:
    return isinstance(line, dict) and "critic/score/mean" in line


def _staleness(axis: Axes, findings: Findings | None) -> bool:
    axis.set_title("Staleness of trained tokens")
    axis.set_xlabel("update − version that sampled the token")
    if findings is None or not findings.tokens_by_staleness:
        return False
    staleness = sorted(findings.tokens_by_staleness)
    counts = np.array([findings.tokens_by_staleness[each] for each in staleness], dtype=np.float64)
    share = 100 * counts / counts.sum()
    bound = findings.bound
    colours = [ALARM if bound is not None and each > bound else REWARD for each in staleness]
    bars = axis.bar(staleness, share, color=colours, width=0.7)
    axis.bar_label(bars, [f"{each:.1f}%" for each in share], padding=2, fontsize=8)
    axis.set_ylabel("tokens, %")
    axis.set_xticks(range(min(0, staleness[0]), max(staleness[-1], bound or 0) + 1))
    if bound is not None:
        axis.axvline(bound + 0.5, color=ALARM, linestyle="--", linewidth=1.2, label=f"bound {bound}")
        axis.legend(loc="best", frameon=False)
    return True


def _response_length(axis: Axes, record: RunRecord) -> bool:
    axis.set_title("Response length")
    axis.set_xlabel("update")
    axis.set_ylabel("tokens")
    mean, longest = record.series("response_length/mean"), record.series("response_length/max")
    if not len(mean):
        return False
    axis.plot(mean.step, mean.value, color=REWARD, linewidth=1.4, label="mean")
    if len(longest):
        axis.plot(longest.step, longest.value, color=QUIET, linewidth=0.8, alpha=0.7, label="longest")
    axis.set_ylim(bottom=0)
    axis.legend(loc="best", frameon=False)
    return True


def _time_by_stage(axis: Axes, record: RunRecord) -> bool:
    axis.set_title("Time by stage")
    axis.set_xlabel("seconds, all updates together")
    names = [name for name in record.names("timing_s/") if name != "timing_s/step"]  # the step is the sum of the others
    totals = [(name.removeprefix("timing_s/"), float(record.series(name).value.sum())) for name in names]
    longest = sorted(totals, key=lambda entry: entry[1])[-MOST_STAGES:]
    if not longest:
        return False
    bars = axis.barh([name for name, _ in longest], [total for _, total in longest], color=REWARD, height=0.65)
    axis.bar_label(bars, [f"{total:.1f}" for _, total in longest], padding=3, fontsize=8)
    axis.margins(x=0.12)
    return True


def _policy(axis: Axes, record: RunRecord) -> bool:
    axis.set_title("Policy")
    axis.set_xlabel("update")
    drawn = False
    for name, colour in (("actor/entropy", REWARD), ("actor/ppo_kl", ACCURACY), ("actor/grad_norm", QUIET)):
        series = record.series(name)
        if len(series):
            axis.plot(series.step, smooth(series.value), color=colour, linewidth=1.4, label=name)
            drawn = True
    if drawn:
        axis.legend(loc="best", frameon=False)
    return drawn


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred moving average; at the ends over what there is."""
    width = max(1, round(len(values) * SMOOTHING)) | 1
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")
