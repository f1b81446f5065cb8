"""Settings from a recipe, and from what a run of it measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from statistics import median

from flowrl import pipeline
from flowrl.config import Recipe
from flowrl.report.events import read_events
from flowrl.report.record import RunRecord
from flowrl.simulate.durations import Measured
from flowrl.simulate.setting import Setting

LEAST_RESPONSES = 20


def setting_of_recipe(recipe: Recipe, num_nodes: int = 1) -> Setting:
    """Sizes, bound and policy are the recipe's; how long things take is not in it."""
    workers = pipeline.build(recipe, num_nodes).workers
    return Setting(
        batch_groups=recipe.train.batch_groups,
        group_size=recipe.rollout.group_size,
        max_staleness=recipe.staleness.max,
        surplus_groups=recipe.rollout.oversampling,
        late=recipe.staleness.late,
        engines=sum(worker.worker == "rollout" for worker in workers),
        concurrency=recipe.rollout.concurrency,
        shards=num_nodes,
    )


def measured_times(run: Path, batch_rows: int) -> dict[str, object]:
    """Fields of `Setting` from a run's records: response times from its events; the trainer's from its metrics, medians
    over its updates. Raises ValueError for a run with too little to measure."""
    record = RunRecord.read(run)
    seconds = list(_response_seconds(run)) if (run / "events.jsonl").is_file() else []
    if len(seconds) < LEAST_RESPONSES:
        raise ValueError(f"run: {str(run)!r} has {len(seconds)} responses in its events; at least {LEAST_RESPONSES}")
    busy, publishing = (record.series(f"timing_s/{name}").value for name in ("update_actor", "update_weights"))
    if not len(busy):
        raise ValueError(f"run: {str(run)!r} has no update in its metrics; at least one must have ended")
    publish_s = median(publishing) if len(publishing) else 0.0
    row_train_s = max(0.0, median(busy) - publish_s) / batch_rows
    return {"durations": Measured(seconds), "row_train_s": float(row_train_s), "step_s": float(publish_s)}


def _response_seconds(run: Path) -> Iterator[float]:
    """From dispatch to the last token, waiting for a place in the engine included."""
    begun = {}
    for event in read_events(run / "events.jsonl"):
        if event.kind == "dispatched":
            begun[event.key] = event.t
        elif event.kind == "sampled" and event.key in begun:
            yield max(0.0, event.t - begun.pop(event.key))
