"""`flowrl report RUN`: checks the event log of a run, prints its figures and draws its curves."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="a run's directory, runs/NAME")


def run(arguments: argparse.Namespace) -> int:
    from flowrl.report.run_report import print_report

    return 0 if print_report(Path(arguments.run)) else 1
