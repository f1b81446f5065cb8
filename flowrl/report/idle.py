"""How long the stages of a run had nothing to do, from what the run left."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

from flowrl.report.events import Event
from flowrl.report.record import RunRecord


def rollout_idle_share(events: Iterable[Event]) -> float | None:
    """Share of the time, from a node's first dispatched row to its last sampled one before the last training, in which
    none of its rows was being sampled; the mean over nodes. None if nothing was dispatched."""
    began: dict[int, list[float]] = defaultdict(list)
    ended: dict[int, list[float]] = defaultdict(list)
    until = 0.0
    for event in events:
        if event.kind == "dispatched":
            began[event.node].append(event.t)
        elif event.kind in ("sampled", "lost"):
            ended[event.node].append(event.t)
        elif event.kind == "trained":
            until = max(until, event.t)
    shares = [_idle_share(np.array(began[node]), np.array(ended[node]), until) for node in began]
    known = [share for share in shares if share is not None]
    return float(np.mean(known)) if known else None


def train_idle_share(record: RunRecord) -> float | None:
    """Time that the trainer waited for rows, of all time of its updates."""
    waited, step = record.series("timing_s/wait_for_rows"), record.series("timing_s/step")
    total = float(step.value.sum())
    return float(waited.value.sum()) / total if total > 0 else None


def mapped_idle_shares(record: RunRecord, since: float) -> dict[str, float]:
    """Stage -> share of its worker's time that it waited for rows, over what was reported after `since`."""
    shares = {}
    for name in record.names("perf/idle_s/"):
        stage = name.removeprefix("perf/idle_s/")
        idle, span = record.series(name), record.series(f"perf/span_s/{stage}")
        total = float(span.value[span.t > since].sum())
        if total > 0:
            shares[stage] = float(idle.value[idle.t > since].sum()) / total
    return shares


def _idle_share(began: np.ndarray, ended: np.ndarray, until: float) -> float | None:
    began, ended = began[began < until], ended[ended < until]
    if not len(began):
        return None
    times = np.concatenate([began, ended])
    order = np.argsort(times, kind="stable")
    running = np.cumsum(np.concatenate([np.ones(len(began)), -np.ones(len(ended))])[order])
    times = np.append(times[order], until)
    idle_s = float(np.diff(times)[running <= 0].sum())
    return idle_s / (until - times[0]) if until > times[0] else None
