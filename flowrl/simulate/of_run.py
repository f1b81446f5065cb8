"""Settings from a recipe, and from what a run of it measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from flowrl import pipeline
from flowrl.config import Recipe
from flowrl.report.events import read_events
from flowrl.report.record import RunRecord
from flowrl.simulate.durations import Measured
from flowrl.simulate.setting import Setting

LEAST_RESPONSES = 20


def setting_of_recipe(recipe: Recipe, num_nodes: int = 1) -> Setting:
    """Sizes, bound and policy are the recipe's; how long things take is not in it. Raises ValueError for producers
    whose engines are not like rollout's."""
    for name in recipe.producers:
        if (places := recipe.producer(name).rollout.concurrency) != recipe.rollout.concurrency:
            raise ValueError(
                f"producers.{name}.concurrency: {places}; engines are simulated alike, with rollout.concurrency="
                f"{recipe.rollout.concurrency}"
            )
    workers = pipeline.build(recipe, num_nodes).workers
    return Setting(
        batch_groups=recipe.train.batch_groups,
        group_size=recipe.rollout.group_size,
        max_staleness=recipe.staleness.max,
        surplus_groups=recipe.rollout.oversampling,
        late=recipe.staleness.late,
        engines=sum(worker.worker in recipe.rollout_stages for worker in workers),
        concurrency=recipe.rollout.concurrency,
        shards=num_nodes,
    )


def measured_times(run: Path, batch_rows: int, micro_batch_tokens: int) -> dict[str, object]:
    """Fields of `Setting` from a run's records: response times from its events, and how long engines took to begin with
    new weights; the trainer's times from its metrics, means over all updates but the first tenth, and how many of its
    rows make a micro-batch. Raises ValueError for a run with too little to measure."""
    record = RunRecord.read(run)
    has_events = (run / "events.jsonl").is_file()
    seconds = response_seconds(run) if has_events else []
    if len(seconds) < LEAST_RESPONSES:
        raise ValueError(f"run: {str(run)!r} has {len(seconds)} responses in its events; at least {LEAST_RESPONSES}")
    busy, publishing = (record.series(f"timing_s/{name}").value for name in ("update_actor", "update_weights"))
    if not len(busy):
        raise ValueError(f"run: {str(run)!r} has no update in its metrics; at least one must have ended")
    step_s = _settled_mean(publishing)
    row_train_s = max(0.0, _settled_mean(busy) - step_s) / batch_rows
    row_tokens = _settled_mean(record.series("perf/total_num_tokens").value) / batch_rows
    return {
        "durations": Measured(seconds),
        "row_train_s": row_train_s,
        "step_s": step_s,
        "micro_batch_rows": min(batch_rows, max(1, int(micro_batch_tokens / row_tokens))) if row_tokens else 1,
        "publish_s": _seconds_to_new_weights(run),
    }


def _settled_mean(values: np.ndarray) -> float:
    return float(values[len(values) // 10 :].mean()) if len(values) else 0.0


def _seconds_to_new_weights(run: Path) -> float:
    """From the publishing of a version to the first group that is reserved for it: loading, and all the ways between.
    A median."""
    published: dict[int, float] = {}
    reserved: dict[int, float] = {}
    for event in read_events(run / "events.jsonl"):
        if event.version is None:
            continue
        if event.kind == "published":
            published.setdefault(event.version, event.t)
        elif event.kind == "reserved":
            reserved.setdefault(event.version, event.t)
    lags = [reserved[version] - t for version, t in published.items() if reserved.get(version, 0.0) >= t]
    return float(median(lags)) if lags else 0.0


def response_seconds(run: Path) -> list[float]:
    """From dispatch to the last token, waiting for a place in the engine included. Those that were dropped or lost
    before their end would have taken longer than until then, so each stands for the others that did (Kaplan and Meier
    1958, in the form of Efron 1967: what has no end is shared out among all that are longer)."""
    begun: dict[Any, float] = {}
    ended: list[float] = []
    cut_off: list[float] = []
    for event in read_events(run / "events.jsonl"):
        if event.kind == "dispatched":
            begun[event.key] = event.t
        elif event.kind in ("sampled", "dropped", "lost") and event.key in begun:
            seconds = max(0.0, event.t - begun.pop(event.key))
            (ended if event.kind == "sampled" else cut_off).append(seconds)
    return shared_out(ended, cut_off)


def shared_out(ended: Sequence[float], cut_off: Sequence[float]) -> list[float]:
    """As many durations as both have, distributed as Kaplan and Meier estimate; what was cut off after the longest that
    ended counts as that."""
    if not cut_off or not ended:
        return sorted(ended)
    observed = sorted([(seconds, False) for seconds in ended] + [(seconds, True) for seconds in cut_off])
    values, weights = [], []
    share, num_left = 1.0, len(observed)
    for seconds, is_cut_off in observed:
        if is_cut_off and num_left > 1:
            share *= num_left / (num_left - 1)
        elif not is_cut_off:
            values.append(seconds)
            weights.append(share)
        num_left -= 1
    places = (np.arange(len(observed)) + 0.5) / len(observed)
    below = np.cumsum(weights[:-1]) / len(observed)
    return [values[at] for at in np.searchsorted(below, places)]
