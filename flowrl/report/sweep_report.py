"""What a person reads of a sweep: `report.html`, its pictures, `points.csv`, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table as ScreenTable

from flowrl.report.page import Part, Picture, Pictures, Table, Words, write_page
from flowrl.report.sweep_plots import LEGEND, choose_axis, draw_sweep
from flowrl.report.sweep_table import (
    PointRow,
    SweepTable,
    is_seed,
    ordered,
    percent,
    read_sweep,
    spread,
    write_csv,
    written,
)

WIDTH = 160  # of the table, where it does not go to a terminal
SHOWN = ("accuracy_after", "reward_final", "seconds_to_reward", "tokens_per_s")
HEADINGS = {
    "accuracy_after": "accuracy",
    "reward_final": "reward",
    "tokens_per_s": "tokens/s",
}


def print_sweep_report(path: Path, axis: str | None, reward: float | None) -> bool:
    """Writes the report into the sweep's directory and prints its table. Says whether every point ran to a good end.

    Raises ValueError if `path` is no sweep's, or `axis` does not vary in it."""
    table = read_sweep(path, reward)
    x = choose_axis(table, axis)
    write_csv(table, path / "points.csv")
    folder = path / "pictures"
    folder.mkdir(exist_ok=True)
    pictures = draw_sweep(table, x, folder)
    header, rows = summary(table, x)
    _write_page(path / "report.html", table, header, rows, pictures)
    console = Console()
    console.width = console.width if console.is_terminal else WIDTH
    screen = ScreenTable(box=None, padding=(0, 2, 0, 0))
    for name in header:
        screen.add_column(escape(name))
    for cells in rows:
        screen.add_row(*map(escape, cells))
    console.print(screen)
    for row in unfinished(table):
        print(f"{row.point.name}: {row.state}{_reason(row)}")
    print(f"points           {path / 'points.csv'}")
    print(f"pictures         {folder}")
    print(f"page             {path / 'report.html'}")
    return all(row.outcome is not None and row.outcome.state.is_good for row in table.rows)


def summary(table: SweepTable, axis: str) -> tuple[list[str], list[list[str]]]:
    """A row for each place on the axis and each setting of what else varies, seeds together: mean ± deviation."""
    fields = [axis, *(field for field in table.fields if field != axis and not is_seed(field))]
    shown = (*SHOWN, *(f"idle_{stage}" for stage in table.stages))
    measures = {
        name: percent(table.measures[name]) if name.startswith("idle_") else table.measures[name]
        for name in shown
        if name in table.measures
    }
    idle = {f"idle_{stage}": f"{stage} idle %" for stage in table.stages}
    headings = {
        **HEADINGS,
        **idle,
        "seconds_to_reward": f"s to reward {table.reward:.3g}" if table.reward is not None else "",
    }
    header = [*fields, "points", *(headings[name] for name in measures)]
    rows = []
    for settings in _settings(table, fields):
        here = [row for row in table.compared() if tuple(row.value(field) for field in fields) == settings]
        rows.append([*settings, str(len(here)), *(str(spread(here, each)) for each in measures.values())])
    return header, rows


def unfinished(table: SweepTable) -> list[PointRow]:
    return [row for row in table.rows if row.state != "finished"]


def _settings(table: SweepTable, fields: Sequence[str]) -> list[tuple[str, ...]]:
    found = list(dict.fromkeys(tuple(row.value(field) for field in fields) for row in table.compared()))
    places = ordered([settings[0] for settings in found])
    return sorted(found, key=lambda settings: places.index(settings[0]))


def _write_page(
    path: Path, table: SweepTable, header: Sequence[str], rows: Sequence[Sequence[str]], pictures: dict[str, Path]
) -> None:
    plan = table.plan
    sections: list[tuple[str, Part]] = [("Summary", Table(header, rows))]
    if pictures:
        sections.append(("Pictures", Pictures([Picture(each) for each in pictures.values()], LEGEND)))
    left = unfinished(table)
    if left:
        reasons = [[row.point.name, row.state, row.outcome.reason if row.outcome else ""] for row in left]
        sections.append(("Points that did not run to their end", Table(["point", "state", "why"], reasons, (2,))))
    sections.append(("Points", _points(table)))
    fixed = [(field, value) for field, value in table.rows[0].point.settings if field not in table.fields]
    if fixed:
        sections.append(("The same for all", Words("\n".join(f"{field}={value}" for field, value in fixed))))
    done = len(table.rows) - sum(row.outcome is None for row in table.rows)
    lead = f"{plan.recipe} · {plan.search} · {done} of {len(table.rows)} points done"
    write_page(path, f"Sweep {path.resolve().parent.name}", lead, sections)


def _points(table: SweepTable) -> Table:
    measures = table.measures
    header = [*table.fields, "state", "wall s", "updates", *(name.replace("_", " ") for name in measures)]
    rows = []
    for row in table.rows:
        figures = [written(measure(row.figures)) if row.figures else "" for measure in measures.values()]
        rows.append([
            *(row.value(field) for field in table.fields),
            row.state,
            written(row.outcome.wall_s) if row.outcome else "",
            str(row.figures.updates) if row.figures else "",
            *figures,
        ])  # fmt: skip
    return Table(header, rows)


def _reason(row: PointRow) -> str:
    return f": {row.outcome.reason}" if row.outcome is not None and row.outcome.reason else ""
