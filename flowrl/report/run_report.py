"""What a person reads of a run: the check's verdict, the figures, the picture. The order of these, nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.report.curves import draw
from flowrl.report.record import RunRecord
from flowrl.report.staleness_check import check_run, describe

SHOWN = ("steps", "rl_s", "wall_s", "accuracy_before", "accuracy_after", "max_staleness", "mean_staleness")


def print_report(directory: Path, summary: Mapping[str, Any] | None = None) -> bool:
    """Checks the event log, draws `curves.png`, prints both. Says whether the check found nothing wrong.

    Raises ValueError if `directory` is no run's.
    """
    record = RunRecord.read(directory)
    figures = record.summary if summary is None else summary
    findings = check_run(directory) if (directory / "events.jsonl").is_file() else None
    picture = directory / "curves.png"
    draw(record, findings, picture)
    for name in SHOWN:
        if figures.get(name) is not None:
            print(f"{name:<16} {figures[name]}")
    print(describe(findings) if findings is not None else "no events.jsonl: staleness was not checked")
    print(f"curves           {picture}")
    return findings is None or findings.is_clean
