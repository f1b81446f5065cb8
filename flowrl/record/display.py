"""What a person sees while a run goes on: a live table on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from controllers.supervisor import WorkerState

LINE_EVERY_S = 5.0
SHOWN = {
    "critic/score/mean": "reward",
    "training/off_policy/trajectory_staleness/mean": "staleness",
    "training/off_policy/trajectory_staleness/max": "staleness max",
    "perf/throughput": "tokens/s",
    "timing_s/step": "s/update",
    "actor/entropy": "entropy",
    "response_length/mean": "response length",
}


class Display:
    """Use with `with`. Only node 0 shows anything (`is_shown`)."""

    def __init__(self, name: str, steps: int, is_shown: bool) -> None:
        self.is_shown = is_shown
        self.console = Console(file=sys.stdout)
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} updates"),
            TimeElapsedColumn(), console=self.console,
        )  # fmt: skip
        self.task = self.progress.add_task(name, total=steps)
        self.steps = steps
        self.values: dict[str, float] = {}
        self.workers: dict[str, WorkerState] = {}
        self.waits: dict[str, str] = {}
        self.accuracies: list[tuple[int, float]] = []
        self.last_line = 0.0
        is_live = is_shown and self.console.is_terminal
        self.live = Live(self, console=self.console, refresh_per_second=4) if is_live else None

    def __enter__(self) -> Display:
        if self.live is not None:
            self.live.__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        if self.live is not None:
            self.live.__exit__(*exc)

    def metrics(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.values.update({key: value for key, value in metrics.items() if key in SHOWN})
        if step is None or "critic/score/mean" not in metrics:
            return
        self.progress.update(self.task, completed=step)
        if self.is_shown and self.live is None and time.monotonic() - self.last_line > LINE_EVERY_S:
            self.last_line = time.monotonic()
            shown = "  ".join(f"{label} {self.values[key]:.3g}" for key, label in SHOWN.items() if key in self.values)
            waits = ", ".join(f"{worker} for {what}" for worker, what in sorted(self.waits.items()) if what)
            print(f"update {step}/{self.steps}  {shown}  waiting: {waits or 'nobody'}", flush=True)

    def evaluated(self, version: int, accuracy: float, prompts: int) -> None:
        self.accuracies.append((version, accuracy))
        if self.is_shown:
            self.console.print(f"version {version}: accuracy {accuracy:.1%} on {prompts} held-out prompts")

    def worker(self, worker: str, state: WorkerState, text: str) -> None:
        self.workers[worker] = state
        if state in (WorkerState.DOWN, WorkerState.FAILED):
            self.console.print(f"{worker}: {text}", markup=False, highlight=False, soft_wrap=True)

    def stalled(self, worker: str, text: str) -> None:
        self.console.print(f"{worker}: {text}", markup=False, highlight=False, soft_wrap=True)

    def waiting(self, worker: str, what: str) -> None:
        self.waits[worker] = what

    def ended(self, code: int, reason: str) -> None:
        if code:  # on every node: each may be looked at alone
            self.console.print(f"the run ended early: {reason}", markup=False, highlight=False, soft_wrap=True)

    def __rich__(self) -> Group:
        numbers = Table.grid(padding=(0, 3))
        for key, label in SHOWN.items():
            if key in self.values:
                numbers.add_row(label, f"{self.values[key]:.4g}")
        if self.accuracies:
            version, accuracy = self.accuracies[-1]
            numbers.add_row("accuracy", f"{accuracy:.1%} (version {version}; first {self.accuracies[0][1]:.1%})")
        states = Table(box=None, padding=(0, 2))
        states.add_column("worker")
        states.add_column("state")
        states.add_column("waits for")
        for worker, state in sorted(self.workers.items()):
            states.add_row(worker, state.value, self.waits.get(worker, ""))
        return Group(self.progress, numbers, states)
