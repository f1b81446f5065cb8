"""What a stage is: its declaration. Imports nothing heavy, so that a bad graph is refused at once.

The executor of a stage is named by a dotted path and imported only in the worker that runs it. `graph.py` derives the
edges between stages from their columns; `placement.py` says where each worker runs.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class Unit(enum.Enum):
    """How much a stage takes at a time."""

    ROW = "row"
    GROUP = "group"
    BATCH = "batch"


class Kind(enum.Enum):
    """MAPPED: `run` names a class with `process(rows) -> columns`; the executor owns the loop around it.
    DRIVER: `run` names a function `main(context)` that owns its loop and its whole process."""

    MAPPED = "mapped"
    DRIVER = "driver"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """reads, writes: columns; one_value: those written of which every row must have one value. `optional` columns are
    delivered if they are there and never waited for. `after`: stages that must have ended before this one starts.
    Stages with one `worker` name share a process."""

    name: str
    run: str
    kind: Kind = Kind.MAPPED
    unit: Unit = Unit.ROW
    reads: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    one_value: tuple[str, ...] = ()
    partition: str = "train"
    pool: str = "cpu"
    worker: str = ""
    after: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError("stage.name: empty; a stage needs a name")
        if ":" not in self.run:
            raise ValueError(f"stages.{self.name}.run: {self.run!r}; a dotted path reads 'package.module:name'")
        if not self.worker:
            object.__setattr__(self, "worker", self.name)

    @property
    def takes_batches(self) -> bool:
        """From the queue, against the clock."""
        return self.kind is Kind.DRIVER and self.unit is Unit.BATCH and bool(self.reads)

    @property
    def is_hosted(self) -> bool:
        """Runs in the process of the driver that takes the batches."""
        return self.kind is Kind.MAPPED and self.unit is Unit.BATCH
