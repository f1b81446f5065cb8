"""What a person reads of a run: the check's verdict, the figures, the picture, the page. The order of these, nothing
else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl.report.curves import draw
from flowrl.report.page import Part, Picture, Table, Words, write_page
from flowrl.report.record import RunRecord
from flowrl.report.staleness_check import Findings, check_run, describe

SAMPLES = 12
SAMPLE_COLUMNS = ("group", "reward", "prompt", "response", "ground_truth")
SHOWN = ("steps", "rl_s", "wall_s", "accuracy_before", "accuracy_after", "max_staleness", "mean_staleness")


def print_report(directory: Path, summary: Mapping[str, Any] | None = None) -> bool:
    """Checks the event log, draws `curves.png`, writes both into `report.html`, prints what it found. Says whether the
    check found nothing wrong.

    Raises ValueError if `directory` is no run's.
    """
    record = RunRecord.read(directory)
    figures = record.summary if summary is None else summary
    findings = check_run(directory) if (directory / "events.jsonl").is_file() else None
    picture = directory / "curves.png"
    draw(record, findings, picture)
    page = directory / "report.html"
    write_run_page(page, record, figures, findings, picture)
    for name in SHOWN:
        if figures.get(name) is not None:
            print(f"{name:<16} {figures[name]}")
    print(describe(findings) if findings is not None else "no events.jsonl: staleness was not checked")
    print(f"curves           {picture}")
    print(f"page             {page}")
    return findings is None or findings.is_clean


def write_run_page(
    path: Path, record: RunRecord, figures: Mapping[str, Any], findings: Findings | None, picture: Path
) -> None:
    known = [[name.replace("_", " "), f"{figures[name]}"] for name in SHOWN if figures.get(name) is not None]
    sections: list[tuple[str, Part]] = [("Curves", Picture(picture))]
    if known:
        sections.insert(0, ("Figures", Table(["", ""], known)))
    if findings is not None:
        verdict = "Staleness check: nothing wrong" if findings.is_clean else "Staleness check: VIOLATED"
        sections.append((verdict, Words(describe(findings))))
    samples = record.last_samples(SAMPLES)
    if samples:
        rows = [[str(each.get(name, "")) for name in SAMPLE_COLUMNS] for each in samples]
        sections.append(("Last samples", Table(SAMPLE_COLUMNS, rows, (2, 3, 4))))
    if record.recipe:
        sections.append(("Recipe", Words(record.recipe, folded="resolved, with every default")))
    ended = "" if record.summary or figures else " · not ended yet"
    write_page(path, f"Run {record.name}", f"{len(record.lines)} lines of metrics{ended}", sections)
