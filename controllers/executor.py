"""Runs the mapped stages of a worker: take, process, put, acknowledge, a thread or several for each stage.

An executor is a class that a stage's `run` names:

    class Executor(Protocol):
        max_rows: int                                                # optional: the most rows of a call, 64 if not said
        concurrency: int                                             # optional: calls at once, 1 if not said
        def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None: ...
        def process(self, rows: Rows) -> Mapping[str, Column]: ...   # the stage's columns, a row for each row; or None
        def close(self) -> None: ...                                 # optional

`process` is called from the stage's own threads, `concurrency` of them side by side, and again with the same rows if
this worker dies before they are acknowledged: its results must follow from its input. Drivers, which own their loops,
are none of this file's business; `batches.py` runs the stages that they host.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import msgspec

from controllers.context import WorkerContext
from controllers.dotted import load_attribute
from controllers.idle import IdleAccount
from controllers.stage import Stage
from transfer_queue.client import QueueClient
from transfer_queue.errors import DuplicateRow
from transfer_queue.rows import Column, RowKey, Rows

_MAX_ROWS = 64
# How long a take may be parked in the queue, which is also how long a stop may have to wait for it.
_WAIT_S = 1.0


def run_stages(context: WorkerContext) -> None:
    """Until `context.stopping`. The first stage that fails ends the others; it is raised, by name."""
    stages = [msgspec.convert(stage, Stage) for stage in context.payload["stages"]]
    executors = {stage.name: make_executor(stage, context) for stage in stages}
    failures: list[tuple[Stage, Exception]] = []

    def run(stage: Stage) -> None:
        try:
            _run_stage(context, stage, executors[stage.name])
        except Exception as error:
            failures.append((stage, error))
            context.stopping.set()

    threads = [
        threading.Thread(target=run, args=(stage,), name=stage.name)
        for stage in stages
        for _ in range(getattr(executors[stage.name], "concurrency", 1))
    ]
    for thread in threads:
        thread.start()
    context.ready()
    for thread in threads:
        thread.join()
    for executor in executors.values():
        if hasattr(executor, "close"):
            executor.close()
    for stage, error in failures:
        raise RuntimeError(f"stage {stage.name!r}: {error!r}") from error


def make_executor(stage: Stage, context: WorkerContext) -> Any:
    try:
        return load_attribute(stage.run)(context, stage.settings)
    except Exception as error:
        raise RuntimeError(f"stage {stage.name!r} cannot be set up: {error!r}") from error


def _run_stage(context: WorkerContext, stage: Stage, executor: Any) -> None:
    max_rows = getattr(executor, "max_rows", _MAX_ROWS)
    idle = IdleAccount(context, stage.name)
    done: Sequence[RowKey] = ()
    with QueueClient(context.queue_endpoints, secret=context.queue_secret, name=context.name) as queue:
        while not context.stopping.is_set():
            idle.tell()
            with idle.waiting():
                rows = queue.take(stage.name, max_rows=max_rows, wait_s=_WAIT_S, done=done).rows
            if len(rows):
                with context.waiting_for(f"{stage.name}.process to return, with {len(rows)} rows"):
                    columns = executor.process(rows) or {}
                refuse_unfit_columns(stage, columns)
                if columns:
                    _put(queue, Rows(rows.keys, columns))
            done = rows.keys
        if done:
            queue.ack(stage.name, done)
    idle.tell(is_last=True)


def _put(queue: QueueClient, rows: Rows) -> None:
    """Where another worker has done some of the rows meanwhile, because their lease was lost, its columns stand."""
    try:
        queue.put(rows.keys, rows.columns)
    except DuplicateRow:
        for index in range(len(rows)):
            row = rows.select([index])
            with suppress(DuplicateRow):
                queue.put(row.keys, row.columns)


def refuse_unfit_columns(stage: Stage, written: Mapping[str, Column]) -> None:
    """A column that is missing would be waited for forever, and one of another form be taken for something else."""
    field = f"stages.{stage.name}.writes"
    if not isinstance(written, Mapping) or set(written) != set(stage.writes):
        given = (
            sorted(written) if isinstance(written, Mapping) else f"a {type(written).__name__}, no mapping of columns"
        )
        raise ValueError(f"{field}: {sorted(stage.writes)}, but process gave {given}")
    for name, column in written.items():
        if not isinstance(column, Column):
            raise ValueError(f"{field}: {name!r} is a {type(column).__name__}; must be a Column of transfer_queue.rows")
        if name in stage.one_value and (column.lengths != 1).any():
            counts = sorted(set(column.lengths.tolist()))
            raise ValueError(f"{field}: {name!r} has {counts} values in a row; must have one in each")
