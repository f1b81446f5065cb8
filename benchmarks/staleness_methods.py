"""What staleness does to learning, method by method: a sweep on the quickstart's task, its table and its plot.

    python benchmarks/staleness_methods.py --out sweeps/methods [--jobs 2] [--plot docs/staleness.png]

Runs (or goes on with) 48 runs: staleness.max 0, 2, 4, 8; four methods; three seeds; all from one warm-started model.
Ctrl-C at any time: the same command goes on. `--report` reads what is there and starts nothing. Settings:
`staleness_methods.yaml`, beside this file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowrl.report.point_figures import trailing_mean
from flowrl.report.record import RunRecord
from flowrl.report.sweep_table import read_sweep
from flowrl.sweep.directory import SweepDirectory

HERE = Path(__file__).resolve().parent
# What each says of the algorithm, over the recipe's.
METHODS = {
    "naive": "{name: grpo}",
    "decoupled": "{name: decoupled_ppo}",
    "segment-wise": "{name: segment_ppo}",
    "TIS": "{old: recomputed, correction: {mode: truncate, high: 2.0}}",
}
BOUNDS = (0, 2, 4, 8)
SWEPT = (8, 0, 4, 2)  # the extremes first, so that a sweep that is interrupted has something to say
SEEDS = (0, 1, 2)
COLOURS = {"naive": "#dc2626", "decoupled": "#2563eb", "segment-wise": "#0d9488", "TIS": "#ea580c"}


@dataclass(frozen=True, kw_only=True)
class Run:
    """accuracy: held out, after the last update. fall: of the reward (trailing mean of ten updates), from its best to
    the lowest after that. grad_tail: 99th percentile of the gradient's norm over its median. Shares are of tokens."""

    method: str
    bound: int
    seed: int
    wall_s: float
    staleness: float
    before: float
    accuracy: float
    fall: float
    grad_tail: float
    entropy: float
    masked: float | None
    absent: float | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the sweep's directory; the model goes beside it")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--retry", action="store_true", help="do failed runs anew")
    parser.add_argument("--report", action="store_true", help="only read what is there")
    parser.add_argument("--plot", type=Path, help="where the picture goes")
    parser.add_argument("--json", type=Path, help="where the figures of every run go")
    given = parser.parse_args()
    code = 0 if given.report else sweep(given.out, given.jobs, retry=given.retry)
    runs = read_runs(given.out)
    print(table(runs))
    if given.plot is not None and runs:
        draw(runs, given.plot)
    if given.json is not None:
        given.json.write_text(json.dumps([vars(run) for run in runs], indent=1) + "\n", encoding="utf-8")
    return code


def sweep(out: Path, jobs: int, *, retry: bool) -> int:
    model = out.parent / f"{out.name}-warm" / "start" / "warm_start"
    if not model.is_dir():
        quickstart = HERE.parent / "recipes" / "quickstart.yaml"
        flowrl("run", str(quickstart), f"run.dir={model.parent.parent}", "run.name=start", "train.steps=1", "eval=null")
    return flowrl(
        "sweep", str(HERE / "staleness_methods.yaml"), f"train.seed={','.join(map(str, SEEDS))}",
        f"staleness.max={','.join(map(str, SWEPT))}", f"algorithm={','.join(METHODS.values())}",
        f"model.path={model}", "--out", str(out), "--jobs", str(jobs), *(["--retry"] if retry else []),
    )  # fmt: skip


def flowrl(*arguments: str) -> int:
    process = subprocess.Popen([sys.executable, "-m", "flowrl", *arguments])
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it has heard it too, and ends in order
            continue


def read_runs(out: Path) -> list[Run]:
    """Of the points that ran to their end."""
    names = {value: name for name, value in METHODS.items()}
    directory = SweepDirectory(out)
    found = []
    for row in read_sweep(out, None).compared():
        record = RunRecord.read(directory.run_of(row.point))
        assert row.outcome is not None and row.figures is not None, "compared rows have both"
        reward = trailing_mean(record.series("critic/score/mean").value)
        norm = record.series("actor/grad_norm").value
        found.append(
            Run(
                method=names[row.value("algorithm")],
                bound=int(row.value("staleness.max")),
                seed=int(row.value("train.seed")),
                wall_s=row.outcome.wall_s,
                staleness=float(row.figures.mean_staleness or 0),
                before=float(row.figures.accuracy_before or 0),
                accuracy=float(row.figures.accuracy_after or 0),
                fall=float((np.maximum.accumulate(reward) - reward).max()),
                grad_tail=float(np.percentile(norm, 99) / np.median(norm)),
                entropy=float(record.series("actor/entropy").value[-10:].mean()),
                masked=mean_of(record, "rollout_corr/masked_fraction"),
                absent=mean_of(record, "actor/segment_absent"),
            )
        )
    return found


def mean_of(record: RunRecord, name: str) -> float | None:
    values = record.series(name).value
    return float(values.mean()) if len(values) else None


def table(runs: Sequence[Run]) -> str:
    """Markdown: mean ± deviation over seeds."""
    lines = [
        "| η | method | runs | staleness | accuracy | largest fall of the reward | gradient p99/median | last entropy "
        "| tokens masked | without segment |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for bound in BOUNDS:
        for method in METHODS:
            here = [run for run in runs if (run.bound, run.method) == (bound, method)]
            if not here:
                continue
            cells = [
                str(bound), method, str(len(here)), f"{np.mean([run.staleness for run in here]):.2f}",
                percent([run.accuracy for run in here]), percent([run.fall for run in here]),
                f"{np.mean([run.grad_tail for run in here]):.1f}", f"{np.mean([run.entropy for run in here]):.2f}",
                share([run.masked for run in here]), share([run.absent for run in here]),
            ]  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def percent(values: Sequence[float]) -> str:
    deviation = f" ± {100 * np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f} %{deviation}"


def share(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{100 * np.mean(known):.2f} %" if known else "–"


def draw(runs: Sequence[Run], path: Path) -> None:
    """Accuracy and instability against the bound; dots are seeds, lines their means."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9.6, 4.0), layout="constrained")
    titles = {"accuracy": "accuracy after training, held out (%)", "fall": "largest fall of the reward (points)"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for method, colour in COLOURS.items():
            here = {
                bound: [100 * getattr(run, name) for run in runs if (run.method, run.bound) == (method, bound)]
                for bound in BOUNDS
            }
            places = [place for place, bound in enumerate(BOUNDS) if here[bound]]
            means = [np.mean(here[BOUNDS[place]]) for place in places]
            axes.plot(places, means, color=colour, linewidth=1.8, label=method)
            for place in places:
                values = here[BOUNDS[place]]
                axes.scatter([place] * len(values), values, color=colour, s=16, alpha=0.6, linewidth=0)
        axes.set_xticks(range(len(BOUNDS)), [str(bound) for bound in BOUNDS])
        axes.set(xlabel="staleness.max (η)", title=title)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    panels[0].legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=90)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
