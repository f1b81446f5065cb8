"""Works a sweep's points off: so many at once, each a run of its own; ends, timeouts and halving as they come.

Owns the order of things while a sweep goes on. Which points there are is `axes.py`'s and `search.py`'s, what is kept on
disk `directory.py`'s, what a person sees `display.py`'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from threading import Event

from controllers.reaper import Reaper
from flowrl.sweep.axes import Point
from flowrl.sweep.directory import Outcome, State, SweepDirectory
from flowrl.sweep.display import SweepDisplay
from flowrl.sweep.nodes import Nodes
from flowrl.sweep.process import GRACE_S, PointProcess
from flowrl.sweep.search import Halving
from flowrl.sweep.watch import Watch

TURN_S = 0.3


@dataclass(frozen=True, kw_only=True)
class Terms:
    """recipe: its path. jobs: points at once. timeout_s: of a point, None for no limit. metric: that halving goes by.
    has_own_models: each point makes a model of its own, because an axis says how."""

    recipe: str
    jobs: int
    timeout_s: float | None
    metric: str
    has_own_models: bool


@dataclass
class _Running:
    point: Point
    number: int
    process: PointProcess
    watch: Watch
    verdict: State | None = None
    code: int | None = None
    ended_at: float = 0.0


class Work:
    def __init__(
        self, directory: SweepDirectory, terms: Terms, display: SweepDisplay, nodes: Nodes, halving: Halving | None
    ) -> None:
        self._directory = directory
        self._terms = terms
        self._display = display
        self._nodes = nodes
        self._halving = halving
        self._running: list[_Running] = []
        self._started = 0

    def run(self, points: Sequence[Point], stopping: Event) -> None:
        """Returns when every point has an outcome, or, once `stopping` is set, when those that run have ended: they get
        none, and the next time they are done anew. So it is when a node was lost."""
        waiting = [point for point in points if not self._recall(point)]
        scratch = self._directory.path / ".running"
        reaper = Reaper(scratch)
        try:
            while (waiting and not self._is_stopping(stopping)) or self._running:
                while waiting and len(self._running) < self._terms.jobs and not self._is_stopping(stopping):
                    self._start(waiting.pop(0), reaper)
                time.sleep(TURN_S)
                for running in list(self._running):
                    self._look_after(running, is_stopping=self._is_stopping(stopping))
                self._display.refresh()
        finally:
            for running in self._running:  # none, unless the loop above has failed
                running.process.kill()
            reaper.close()

    def _is_stopping(self, stopping: Event) -> bool:
        return stopping.is_set() or bool(self._nodes.lost())

    def arguments(self, point: Point) -> list[str]:
        """Of `flowrl run`."""
        own = [f"run.dir={self._directory.runs}", f"run.name={point.name}"]
        if self._terms.has_own_models:
            own.append(f"model.path={self._directory.path / 'models' / point.name}")
        return [self._terms.recipe, *point.overrides, *own]

    def _recall(self, point: Point) -> bool:
        """Whether an earlier life of the sweep has done the point. Halving hears again what it heard then."""
        outcome = self._directory.outcome(point)
        watch = Watch(self._directory.run_of(point) / "metrics.jsonl", self._terms.metric)
        if outcome is None:
            self._display.waiting(point)
            return False
        reports = watch.reports()
        if self._halving is not None:
            self._halving.is_given_up(point, reports)
            self._halving.ended(point, outcome.state is State.PRUNED, not outcome.state.is_good)
        self._display.ended(point, outcome, watch, is_new=False)
        return True

    def _start(self, point: Point, reaper: Reaper) -> None:
        self._directory.set_aside(point)
        self._started += 1
        arguments = self.arguments(point)
        environment = self._nodes.start(self._started, point.name, arguments)
        process = PointProcess(arguments, self._directory.log_of(point), reaper, environment)
        watch = Watch(self._directory.run_of(point) / "metrics.jsonl", self._terms.metric)
        self._running.append(_Running(point, self._started, process, watch))
        self._display.started(point, watch)

    def _look_after(self, running: _Running, *, is_stopping: bool) -> None:
        reports = running.watch.reports()
        if running.code is None and (code := running.process.poll()) is not None:
            running.code, running.ended_at = code, time.monotonic()
        if running.code is not None and self._nodes.has_ended(running.number):
            self._conclude(running)
        elif running.code is None and not running.process.is_ending:
            timeout_s = self._terms.timeout_s
            if is_stopping:
                self._end(running, None)
            elif timeout_s is not None and running.process.wall_s > timeout_s:
                self._end(running, State.TIMED_OUT)
            elif self._halving is not None and self._halving.is_given_up(running.point, reports):
                self._end(running, State.PRUNED)
        elif running.code is not None and self._nodes.lost():
            self._running.remove(running)
            self._display.interrupted(running.point)
        elif running.code is not None and time.monotonic() > running.ended_at + GRACE_S:
            self._nodes.end()  # a part of a run that has ended elsewhere has had its time

    def _end(self, running: _Running, verdict: State | None) -> None:
        running.verdict = verdict
        running.process.end()
        self._nodes.end()

    def _conclude(self, running: _Running) -> None:
        self._running.remove(running)
        point, process = running.point, running.process
        running.watch.reports()
        if process.is_ending and running.verdict is None:
            self._display.interrupted(point)
            return
        # A run may finish in the moment in which it is given up.
        state = State.FINISHED if running.code == 0 else running.verdict or State.FAILED
        reason = {
            State.FAILED: process.reason(),
            State.TIMED_OUT: f"not done after {self._terms.timeout_s} s (--timeout)",
            State.PRUNED: f"given up at update {running.watch.step}",
        }.get(state, "")
        outcome = Outcome(state=state, wall_s=process.wall_s, reason=reason)
        self._directory.write_outcome(point, outcome)
        if self._halving is not None:
            self._halving.ended(point, state is State.PRUNED, not state.is_good)
        self._display.ended(point, outcome, running.watch, is_new=True)
