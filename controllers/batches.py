"""Runs the mapped stages that a driver hosts, those of whole batches: one after another, on what the driver has taken.

Their executors are those of `executor.py`, called once a batch; `max_rows` and `concurrency` mean nothing here.
"""

from __future__ import annotations

import msgspec

from controllers.context import WorkerContext
from controllers.executor import make_executor, refuse_unfit_columns
from controllers.stage import Stage
from transfer_queue.rows import Rows


class HostedStages:
    """Of one worker of the driver, each of which may ask whether there are any (`bool`). Executors are made on rank 0,
    which processes for all."""

    def __init__(self, context: WorkerContext) -> None:
        self._context = context
        self._stages = [msgspec.convert(stage, Stage) for stage in context.payload.get("stages", ())]
        mine = self._stages if context.rank == 0 else []
        self._executors = [(stage, make_executor(stage, context)) for stage in mine]

    def __bool__(self) -> bool:
        return bool(self._stages)

    @property
    def names(self) -> list[str]:
        return [stage.name for stage in self._stages]

    def process(self, batch: Rows) -> Rows:
        """The columns that they write, of the same rows. Raises RuntimeError by the name of the stage that fails."""
        written = Rows(batch.keys, {})
        for stage, executor in self._executors:
            known = {**batch.columns, **written.columns}
            read = {name: known[name] for name in (*stage.reads, *stage.optional) if name in known}
            with self._context.waiting_for(f"{stage.name}.process to return, with a batch of {len(batch)} rows"):
                try:
                    columns = executor.process(Rows(batch.keys, read)) or {}
                    refuse_unfit_columns(stage, columns)
                    written = Rows(batch.keys, {**written.columns, **columns})
                except Exception as error:
                    raise RuntimeError(f"stage {stage.name!r}: {error!r}") from error
        return written

    def close(self) -> None:
        for _, executor in self._executors:
            if hasattr(executor, "close"):
                executor.close()
