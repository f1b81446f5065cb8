"""The train stage over a record: the same updates from the same rows, without a queue, engines or a controller.

    python -m flowrl.replay.stage RUN OUT RANK        one rank; `ranks.py` starts them

What an update does is `flowrl/stages/train.py`'s, unchanged; this file feeds it and compares.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from controllers.context import WorkerContext
from controllers.eventlog import EventLog
from controllers.messages import WorkerSpec
from flowrl.config import Recipe, load
from flowrl.determinism import fix_kernels
from flowrl.replay.lineage import Lineage, RecordedUpdate
from flowrl.replay.record import RECORD_DIR, digests
from flowrl.stages.train import TrainStage
from flowrl.trainer import checkpoint
from flowrl.trainer.world import World, any_rank, join
from flowrl.weights.place import Route
from transfer_queue.client import QueueClient
from transfer_queue.rows import RowKey, Rows

FIRST_STATE = "step_0"


class ReplayedTraining(TrainStage):
    """`run` ends at the record's end, or at the first update after which a parameter is not what it was."""

    def __init__(self, context: WorkerContext, recipe: Recipe, world: World, lineage: Lineage, replayed: Path) -> None:
        super().__init__(context, recipe, world)
        self._lineage = lineage
        self._replayed = replayed
        self._now: RecordedUpdate | None = None
        self.divergence: dict[str, Any] | None = None

    def run(self) -> None:
        trainer = self.make_trainer(self._replayed)
        start = self._replayed / RECORD_DIR / FIRST_STATE
        if start.is_dir():
            checkpoint.load(start, trainer)
        with self.context.event_log() as events:
            for recorded in self._lineage.updates():
                self._now = recorded
                self.update(recorded.number, trainer, NO_QUEUE, events)
                if self._has_diverged(recorded):
                    break
        self.publishing.export(self.context.run_dir / "model")

    def batch(self, queue: QueueClient, update: int) -> Iterator[Rows]:
        assert self._now is not None and self._now.number == update, f"update {update} is not the one to replay"
        yield from self._now.batches

    def commit(self, update: int, keys: list[RowKey], queue: QueueClient, events: EventLog) -> None:
        """No queue waits to hear of it."""

    def publish(self, version: int, events: EventLog) -> None:
        """Nobody samples."""

    def _has_diverged(self, recorded: RecordedUpdate) -> bool:
        """On every rank alike, because the next update needs all of them."""
        found = digests(dict(self.policy.lm.named_parameters()))
        names = [name for name, digest in recorded.digests.items() if found.get(name) != digest]
        if names and self.divergence is None:
            self.divergence = {"update": recorded.number, "parameters": names, "of": len(recorded.digests)}
        return any_rank(bool(names), self.world)


class NoController:
    """A worker's channel to a controller where there is none: nobody stops it, nobody listens."""

    def __init__(self) -> None:
        self.stopping = threading.Event()

    def send(self, message: Any) -> None:
        """To nobody."""

    def waiting_for(self, what: str) -> AbstractContextManager[None]:
        return nullcontext()


NO_QUEUE: Any = None
"""`update` passes it on to `batch` and `commit`, which have no use for one here."""


def context_of(rank: int, lineage: Lineage, out: Path) -> WorkerContext:
    beginning = lineage.beginning
    device = beginning.device if beginning.device == "cpu" else f"{beginning.device}:{rank}"
    spec = WorkerSpec(
        name=f"replay.0.{rank}",
        worker="train",
        node=0,
        num_nodes=1,
        rank=rank,
        world_size=beginning.world_size,
        index=rank,
        threads=beginning.threads,
        devices=(device,),
        stages=("train",),
        target="",
        payload=Route((0,), (0,)).payload(),
        session_dir=str(out / ".weights"),
        run_dir=str(out),
        control_endpoint="",
        identity="",
        parent=os.getppid(),
    )
    channel: Any = NoController()
    return WorkerContext(spec, channel)


def main(run: Path, out: Path, rank: int) -> None:
    recipe = load(run / "recipe.yaml")
    fix_kernels(recipe)
    lineage = Lineage(run, rank)
    context = context_of(rank, lineage, out)
    meeting = out / ".world"
    with join(rank=rank, world_size=context.world_size, file=meeting, device=context.device) as world:
        stage = ReplayedTraining(context, recipe, world, lineage, run)
        stage.run()
    result = {"rank": rank, "steps": lineage.steps, "divergence": stage.divergence}
    (out / f"rank{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
