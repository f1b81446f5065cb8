"""The train stage: one rank of the trainer's world. Also the warm start that may come before, in the same process.

    for every update: take rows as they become ready, accumulate; when it is full: step, commit, publish, report

Owns the order of these acts. What may be taken is the queue's to say, what an update computes `flowrl/trainer/`'s, and
where weights go `flowrl/weights/`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from controllers.context import WorkerContext
from controllers.eventlog import EventLog
from controllers.messages import FINISHED_TOPIC
from flowrl.config import Recipe, load
from flowrl.stages.warm_start import warm_start
from flowrl.trainer import checkpoint
from flowrl.trainer.batch_metrics import BatchMetrics
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import samples_from_rows
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World, join
from flowrl.weights.place import EVALUATION_PIN, weights_root
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore
from transfer_queue.client import QueueClient
from transfer_queue.rows import RowKey, Rows

TAKE_WAIT_S = 10.0
INCARNATION = 0


def main(context: WorkerContext) -> None:
    recipe = load(context.payload["recipe"])
    if context.num_nodes == 1:
        meeting: dict[str, Any] = {"file": context.session_dir / "trainer-world"}
    else:
        meeting = dict(zip(("host", "port"), context.rendezvous("train"), strict=True))
    with join(
        **meeting,
        rank=context.rank,
        world_size=context.world_size,
        device=context.devices[0],
        interface=recipe.network.interface,
    ) as world:
        TrainStage(context, recipe, world).run()


class Stopped(Exception):
    """The controller has asked this worker to end."""


class TrainStage:
    """Version v is what update v starts from; update v makes version v + 1."""

    def __init__(self, context: WorkerContext, recipe: Recipe, world: World) -> None:
        self.context = context
        self.recipe = recipe
        self.world = world
        self.policy = load_policy(
            recipe.model.path,
            world,
            compute_dtype=recipe.train.compute_dtype,
            temperature=recipe.rollout.temperature,
        )
        # One rank a node writes to the node's tmpfs; one in all to a directory that all nodes see.
        writes = context.index == 0 and (recipe.weights.transport == "shared_memory" or context.rank == 0)
        root = weights_root(recipe, context.session_dir)
        self.store = WeightStore(root, recipe.weights.buffers) if writes else None
        self.publisher = Publisher(self.policy.lm, Path(recipe.model.path), self.store, recipe.model.dtype)
        self.metrics = BatchMetrics(recipe.rollout.group_size)

    def run(self) -> None:
        recipe = self.recipe
        self.context.ready()
        if recipe.warm_start is not None:
            warm_start(self.context, recipe, self.policy, self.publisher, self.world)
            self.publisher.export(self.context.run_dir / "warm_start", writes=self.context.rank == 0)
        trainer = PolicyTrainer(self.policy, self.world, recipe.train, recipe.algorithm)
        queue = QueueClient(self.context.queue_endpoints, secret=self.context.queue_secret)
        events = EventLog(self.context.run_dir / "events.jsonl", self.context.node)
        with queue, events:
            self.publish(0, events)
            started = time.monotonic()
            try:
                for update in range(recipe.train.steps):
                    self.update(update, trainer, queue, events)
                    self.save(update + 1, trainer)
            except Stopped:
                self.context.log("stopped before the last update")
                return
            self.finish(time.monotonic() - started)

    def update(self, update: int, trainer: PolicyTrainer, queue: QueueClient, events: EventLog) -> None:
        started = time.monotonic()
        trainer.begin_update()
        keys: list[RowKey] = []
        for rows in self.ready_rows(queue, update):
            trainer.accumulate(samples_from_rows(rows))
            self.metrics.add(rows, update)
            keys += rows.keys
        measured = trainer.end_update()
        queue.commit(INCARNATION, update, keys)
        for key in keys:
            events.write("trained", key, update=update)
        trained = time.monotonic()
        self.publish(update + 1, events)
        measured |= self.metrics.reduce(self.world, time.monotonic() - started)
        measured["timing_s/update_weights"] = time.monotonic() - trained
        if self.context.rank == 0:
            self.context.report(measured, update + 1)

    def ready_rows(self, queue: QueueClient, update: int) -> Iterator[Rows]:
        """What the queue has for this update, gathered to a micro-batch's size, until the update is full."""
        budget = self.recipe.train.micro_batch_tokens
        waiting: list[Rows] = []
        is_closed = False
        while not is_closed:
            started = time.monotonic()
            with self.context.waiting_for(f"rows for update {update}"):
                taken = queue.take("train", max_rows=self.max_rows, update=update, wait_s=TAKE_WAIT_S)
            self.metrics.waited(time.monotonic() - started)
            if self.context.stopping.is_set():
                raise Stopped
            is_closed = taken.closed
            if len(taken.rows):
                waiting.append(taken.rows)
            if waiting and (is_closed or sum(map(num_tokens, waiting)) >= budget):
                yield Rows.concatenate(waiting)
                waiting = []

    @property
    def max_rows(self) -> int:
        """Of one take. With several ranks, half a rank's share: what is left goes to whoever is free."""
        parts = 1 if self.world.size == 1 else 2 * self.world.size
        return max(1, self.recipe.train.batch_groups // parts) * self.recipe.rollout.group_size

    def publish(self, version: int, events: EventLog) -> None:
        """Makes the version visible to this node's engines, or to all through a shared directory."""
        path = self.publisher.publish(version)
        if path is None or self.store is None:
            return
        if self.context.rank == 0:
            if self.is_evaluated(version):
                self.store.pin(version, EVALUATION_PIN)
            events.write("published", version=version)
        is_shared = self.recipe.weights.transport == "disk"
        self.context.announce("published", {"version": version, "path": str(path)}, everywhere=is_shared)

    def save(self, step: int, trainer: PolicyTrainer) -> None:
        every = self.recipe.run.checkpoint_every
        if step == self.recipe.train.steps or (every and step % every == 0):
            directory = self.context.run_dir / "checkpoints"
            checkpoint.save(directory, trainer, self.world, extra={}, keep=self.recipe.run.checkpoints_kept)

    def is_evaluated(self, version: int) -> bool:
        evaluation, last = self.recipe.eval, self.recipe.train.steps
        return evaluation is not None and (version % evaluation.every == 0 or version == last)

    def finish(self, rl_s: float) -> None:
        """Leaves the trained model as a Hugging Face directory, and says that training is over."""
        self.publisher.export(self.context.run_dir / "model", writes=self.context.rank == 0)
        if self.context.rank:
            return
        steps = self.recipe.train.steps
        summary = {"version": steps, "steps": steps, "rl_s": round(rl_s, 3)}
        self.context.announce("trained", summary | self.metrics.staleness())
        if self.recipe.eval is None:
            self.context.announce(FINISHED_TOPIC, {"version": steps})


def num_tokens(rows: Rows) -> int:
    return len(rows["prompt_tokens"].values) + len(rows["response_tokens"].values)
