"""What a person sees of a sweep: a live table on a terminal; elsewhere a line for each start and end, then a table."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flowrl.sweep.axes import Point
from flowrl.sweep.directory import Outcome, State
from flowrl.sweep.watch import Watch

STYLE = {State.FINISHED: "green", State.PRUNED: "yellow", State.FAILED: "red", State.TIMED_OUT: "red"}
LINE_EVERY_S = 30.0


class SweepDisplay:
    """Use with `with`. fields: the columns of the table, those that vary."""

    def __init__(self, points: Sequence[Point], fields: Sequence[str]) -> None:
        self._points = points
        self._fields = fields
        self._console = Console(file=sys.stdout)
        self._cells: dict[str, tuple[str, Watch | None, Outcome | None]] = {}
        self._live = Live(self, console=self._console, refresh_per_second=2) if self._console.is_terminal else None
        self._said_at = time.monotonic()
        self._ended = 0

    def __enter__(self) -> SweepDisplay:
        if self._live is not None:
            self._live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self._live is not None:
            self._live.__exit__(*exc)
        else:
            self._console.print(self)

    def waiting(self, point: Point) -> None:
        self._cells[point.name] = ("waiting", None, None)

    def started(self, point: Point, watch: Watch) -> None:
        self._cells[point.name] = ("running", watch, None)
        self._say(f"{point.name}: started")

    def interrupted(self, point: Point) -> None:
        self._cells[point.name] = ("interrupted", None, None)
        self._say(f"{point.name}: interrupted; the next time it is done anew")

    def ended(self, point: Point, outcome: Outcome, watch: Watch, *, is_new: bool) -> None:
        """is_new: in this life of the sweep."""
        self._cells[point.name] = (outcome.state.value, watch, outcome)
        self._ended += 1
        done = f"{self._ended} of {len(self._points)}"
        why = f": {outcome.reason}" if outcome.reason else ""
        when = f"after {outcome.wall_s:.0f} s" if is_new else "earlier"
        self._say(f"{point.name}: {outcome.state.value} {when}{why} ({done})")

    def refresh(self) -> None:
        if self._live is None and time.monotonic() - self._said_at > LINE_EVERY_S:
            running = [
                f"{name} at update {watch.step}"
                for name, (state, watch, _) in self._cells.items()
                if state == "running" and watch is not None
            ]
            self._say("running: " + ", ".join(running))

    def __rich__(self) -> Table:
        table = Table(title=f"{self._ended} of {len(self._points)} points done", title_justify="left")
        for field in self._fields or ["point"]:
            table.add_column(Text(field), overflow="fold")
        for name in ("state", "update", "reward", "accuracy", "seconds"):
            table.add_column(name, justify="left" if name == "state" else "right", no_wrap=True)
        for point in self._points:
            table.add_row(*self._row(point))
        return table

    def _row(self, point: Point) -> list[Text]:
        state, watch, outcome = self._cells.get(point.name, ("waiting", None, None))
        values = dict(point.settings)
        colour = STYLE.get(outcome.state, "") if outcome is not None else ""
        values_shown = [values.get(field, "") for field in self._fields] or [point.name]
        figures = [
            str(watch.step) if watch is not None else "",
            f"{watch.reward:.3f}" if watch is not None and watch.reward is not None else "",
            f"{watch.accuracy:.1%}" if watch is not None and watch.accuracy is not None else "",
            f"{outcome.wall_s:.0f}" if outcome is not None else "",
        ]
        return [*map(Text, values_shown), Text(state, style=colour), *map(Text, figures)]

    def _say(self, text: str) -> None:
        self._said_at = time.monotonic()
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)
