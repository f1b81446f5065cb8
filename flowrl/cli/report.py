"""`flowrl report RUN` checks a run's event log, prints its figures, draws curves; `flowrl report SWEEP` compares."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's directory, runs/NAME, or a sweep's")
    parser.add_argument("--x", metavar="FIELD", help="of a sweep: the field to draw against")
    parser.add_argument("--reward", type=float, help="of a sweep: the reward that the time is taken to")


def run(arguments: argparse.Namespace) -> int:
    path = Path(arguments.run)
    if (path / "sweep.json").is_file():
        from flowrl.report.sweep_report import print_sweep_report

        return 0 if print_sweep_report(path, arguments.x, arguments.reward) else 1
    for name in ("x", "reward"):
        if getattr(arguments, name) is not None:
            given = getattr(arguments, name)
            raise ValueError(f"--{name}: {given}; is for sweeps, and {str(path)!r} has no sweep.json")
    from flowrl.report.run_report import print_report

    return 0 if print_report(path) else 1
