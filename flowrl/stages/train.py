"""The train stage: one rank of the trainer's world. Also the warm start that may come before, in the same process.

    for every update: take rows as they become ready, accumulate; when it is full: step, commit, publish, report
    asked to end: all ranks leave the update that they are in, and save what came before it

Where an engine shares the device, rows are accumulated once all are there and the engine has given it.

Owns the order of these acts. What may be taken is the queue's to say, what an update computes `flowrl/trainer/`'s, and
where weights go `flowrl/weights/`'s.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from controllers.batches import HostedStages
from controllers.context import WorkerContext
from controllers.eventlog import EventLog
from controllers.messages import FINISHED_TOPIC
from controllers.roster import installed_versions
from controllers.shard import QUEUE_DIR
from flowrl.algorithms.declarations import Streaming
from flowrl.config import Recipe, load
from flowrl.config.recipe import hands_over_batches, is_strict
from flowrl.determinism import fix_kernels
from flowrl.replay.record import RECORD_DIR, Beginning, RecordWriter
from flowrl.stages.publishing import Publishing
from flowrl.stages.turns import RankTurn
from flowrl.stages.warm_start import warm_start
from flowrl.trainer import checkpoint
from flowrl.trainer.batch_metrics import BatchMetrics
from flowrl.trainer.companions import make_critic, make_reference
from flowrl.trainer.dump import dumping
from flowrl.trainer.flops import peak_flops
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import samples_from_rows
from flowrl.trainer.share import balanced_share, whole_batch, with_columns_of_first
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World, any_rank, join
from transfer_queue.client import QueueClient
from transfer_queue.rows import RowKey, Rows
from transfer_queue.steps import Taken

TAKE_WAIT_S = 1.0
"""So often one that waits for rows looks whether it is to end."""


def main(context: WorkerContext) -> None:
    recipe = load(context.payload["recipe"])
    fix_kernels(recipe)
    if context.num_nodes == 1:
        meeting: dict[str, Any] = {"file": context.session_dir / "trainer-world"}
    else:
        meeting = dict(zip(("host", "port"), context.rendezvous("train"), strict=True))
    with join(
        **meeting,
        rank=context.rank,
        world_size=context.world_size,
        device=context.device,
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
            activation_checkpointing=recipe.train.activation_checkpointing,
            offload=recipe.train.offload,
            lora=recipe.model.lora,
        )
        self.publishing = Publishing(context, recipe, self.policy)
        self.checkpoints = checkpoint.CheckpointWriter(
            context.run_dir / "checkpoints", world, keep=recipe.run.checkpoints_kept
        )
        self.record: RecordWriter | None = None
        self.turn: RankTurn | None = None
        self.started = 0.0
        self.saved_step = 0
        found, _ = recipe.algorithm.streaming(recipe.train.minibatches, recipe.train.epochs)
        self.hosted = HostedStages(context)
        self.streams = found is not Streaming.WAITS and not self.hosted
        self.metrics = BatchMetrics(recipe.rollout.group_size, has_advantage=not recipe.algorithm.estimates_in_trainer)

    def run(self) -> None:
        self.context.ready()
        with self.context.event_log() as events:
            self.turn = turn = RankTurn(self.context, events)
            self.train(events, turn)

    def train(self, events: EventLog, turn: RankTurn) -> None:
        trainer = self.begin()
        self.publishing.begin(trainer.step)
        queue = QueueClient(self.context.queue_endpoints, secret=self.context.queue_secret)
        with queue, closing(self.publishing), closing(self.hosted), self.recording(trainer), self.checkpoints:
            self.publish(trainer.step, events)
            turn.give(trainer.step)
            try:
                for update in range(trainer.step, self.recipe.train.steps):
                    self.update(update, trainer, queue, events)
                    if self.is_due(update + 1):
                        self.save(trainer, queue, events)
                    turn.give(update + 1)
            except Stopped:
                trainer.abandon_update()
                if trainer.step > self.saved_step:
                    self.save(trainer, queue, events)
                self.context.log(f"stopped in update {trainer.step}, with all before it saved")
                return
            self.checkpoints.wait()
            self.finish(time.monotonic() - self.started)

    def begin(self) -> PolicyTrainer:
        """The trainer as the checkpoint has it that this life goes on from, or before the first update."""
        recipe, run_dir = self.recipe, self.context.run_dir
        if self.context.restore_from is not None:
            trainer = self.make_trainer(run_dir)
            extra = checkpoint.load(self.context.restore_from, trainer)
            self.metrics.restore(extra["staleness"])
            self.saved_step = trainer.step
            trainer.objective.kl_coef.value = extra["kl_coef"]
            self.started = time.monotonic() - extra["rl_s"]
            return trainer
        if recipe.warm_start is not None:
            warm_start(self.context, recipe, self.policy, self.publishing.whole, self.world)
            self.publishing.export(run_dir / "warm_start")
        trainer = self.make_trainer(run_dir)
        if recipe.run.record and (recipe.warm_start is not None or recipe.algorithm.has_critic):
            checkpoint.save(run_dir / RECORD_DIR, trainer, self.world, extra={}, keep=1)
        self.started = time.monotonic()
        return trainer

    def make_trainer(self, run_dir: Path) -> PolicyTrainer:
        """From the policy as it is now. run_dir: of the run whose warm start, if it had one, came before."""
        recipe = self.recipe
        return PolicyTrainer(
            self.policy,
            self.world,
            recipe.train,
            recipe.algorithm,
            max_response_tokens=recipe.rollout.max_tokens,
            critic=make_critic(recipe, self.world, run_dir / "warm_start"),
            reference=make_reference(recipe, self.policy, self.world, run_dir / "warm_start"),
        )

    @contextmanager
    def recording(self, trainer: PolicyTrainer) -> Iterator[None]:
        """Inside, what updates consume is written down, if the recipe says so."""
        if not self.recipe.run.record:
            yield
            return
        context = self.context
        beginning = Beginning(
            rank=context.rank,
            world_size=context.world_size,
            life=context.life,
            step=trainer.step,
            device=context.device.partition(":")[0],
            threads=context.threads,
            versions=installed_versions(),
        )
        with RecordWriter(context.run_dir / RECORD_DIR, beginning) as self.record:
            yield

    def update(self, update: int, trainer: PolicyTrainer, queue: QueueClient, events: EventLog) -> None:
        started = time.monotonic()
        batch: Iterable[Rows] = self.batch(queue, update)
        if self.turn is not None and self.turn.is_shared:
            batch = self.whole(batch, self.turn)
        trainer.begin_update()
        keys: list[RowKey] = []
        torch.manual_seed(update_seed(self.recipe.train.seed, update, self.world.rank))
        for rows in batch:
            if self.record is not None:
                self.record.consumed(update, rows)
            trainer.accumulate(samples_from_rows(rows))
            self.metrics.add(rows, update)
            keys += rows.keys
        with (
            dumping(self.context.run_dir, update, self.world.rank),
            self.context.waiting_for(f"the step of update {update}"),
        ):
            measured = trainer.end_update()
        if self.record is not None:
            self.record.updated(update, dict(self.policy.lm.named_parameters()))
        self.commit(update, keys, queue, events)
        trained = time.monotonic()
        self.publish(update + 1, events)
        measured |= self.metrics.reduce(self.world, time.monotonic() - started)
        measured |= rates(measured["training/num_flops"] / self.world.size, measured, self.world.device)
        measured["timing_s/update_weights"] = time.monotonic() - trained
        if self.context.rank == 0:
            self.context.report(measured, update + 1)

    def commit(self, update: int, keys: list[RowKey], queue: QueueClient, events: EventLog) -> None:
        queue.commit(self.context.life, update, keys)
        for key in keys:
            events.write("trained", key, update=update)

    def whole(self, batch: Iterable[Rows], turn: RankTurn) -> list[Rows]:
        """All of it, in host memory; and then the devices, while nobody generates there."""
        rows = list(batch)
        asked = time.monotonic()
        if any_rank(not turn.take(), self.world):
            raise Stopped
        self.metrics.waited(time.monotonic() - asked)
        return rows

    def batch(self, queue: QueueClient, update: int) -> Iterator[Rows]:
        """This rank's rows of the update: as they come, or, if runs are to be repeatable or the update waits for its
        batch anyway, a share of the sorted whole that is as large as any other rank's. Stages of batches get the
        whole."""
        if not is_strict(self.recipe) and (self.streams or (self.world.size == 1 and not self.hosted)):
            yield from self.ready_rows(queue, update)
            return
        batch = whole_batch(self.ready_rows(queue, update), self.world)
        if self.hosted and len(batch):
            with self.context.waiting_for(f"rank 0, which runs {', '.join(self.hosted.names)} on update {update}"):
                batch = with_columns_of_first(batch, self.hosted.process, self.world)
        share = balanced_share(batch, self.world)
        if len(share):
            yield share

    def ready_rows(self, queue: QueueClient, update: int) -> Iterator[Rows]:
        """What the queue has for this update, gathered to a micro-batch's size, until the update is full. Raises
        Stopped on all ranks, and before they meet in anything else, if one of them was asked to end before that."""
        budget = self.recipe.train.micro_batch_tokens
        waiting: list[Rows] = []
        is_closed = is_stopped = False
        while not (is_closed or is_stopped):
            taken = self.take(queue, update)
            is_closed = taken.closed
            is_stopped = self.context.stopping.is_set() and not is_closed
            if len(taken.rows):
                waiting.append(taken.rows)
            if waiting and (is_closed or sum(map(num_tokens, waiting)) >= budget):
                yield Rows.concatenate(waiting)
                waiting = []
        if any_rank(is_stopped, self.world):
            raise Stopped

    def take(self, queue: QueueClient, update: int) -> Taken:
        """Of the update. No rows and not closed: this worker is to end."""
        budget = None if self.world.size == 1 else ("response_tokens", self.recipe.train.micro_batch_tokens)
        started = time.monotonic()
        with self.context.waiting_for(f"rows for update {update}"):
            while True:
                self.publishing.check()  # rows would wait for a version that never comes
                taken = queue.take(
                    "train",
                    max_rows=self.max_rows,
                    budget=budget,
                    update=update,
                    incarnation=self.context.life,
                    wait_s=TAKE_WAIT_S,
                )
                if taken.closed or len(taken.rows) or self.context.stopping.is_set():
                    self.metrics.waited(time.monotonic() - started)
                    return taken

    @property
    def max_rows(self) -> int:
        """Of one take. With several ranks, half a rank's share at most, and no more tokens than a micro-batch has: what
        is left goes to whoever is free, so that ranks end an update within a micro-batch of each other."""
        parts = 1 if self.world.size == 1 else 2 * self.world.size
        return max(1, self.recipe.train.batch_groups // parts) * self.recipe.rollout.group_size

    def publish(self, version: int, events: EventLog) -> None:
        self.publishing.publish(version, events)

    def is_due(self, step: int) -> bool:
        every = self.recipe.run.checkpoint_every
        return step == self.recipe.train.steps or bool(every and step % every == 0)

    def save(self, trainer: PolicyTrainer, queue: QueueClient, events: EventLog) -> None:
        extra = {
            "staleness": self.metrics.state(),
            "rl_s": time.monotonic() - self.started,
            "kl_coef": trainer.objective.kl_coef.value,
        }
        events.flush()  # the log tells of all that a checkpoint covers
        self.checkpoints.save(trainer, extra=extra, beside=partial(self.save_queue, queue))
        self.saved_step = trainer.step

    def save_queue(self, queue: QueueClient, directory: Path) -> None:
        """What of the data is still to be done, and the rows that lie there sampled, while no rank takes any. Where
        engines hand over whole shares they begin with a whole one: part of it would be one too many. Every shard knows
        the run's directory by its own path."""
        place = (directory / QUEUE_DIR).relative_to(self.context.run_dir)
        queue.save(str(place), with_rows=not hands_over_batches(self.recipe))

    def finish(self, rl_s: float) -> None:
        """Leaves the trained model as a Hugging Face directory, and says that training is over."""
        self.publishing.finish()
        self.publishing.export(self.context.run_dir / "model")
        if self.context.rank:
            return
        steps = self.recipe.train.steps
        summary = {"version": steps, "steps": steps, "rl_s": round(rl_s, 3)}
        self.context.announce("trained", summary | self.metrics.staleness())
        if self.recipe.eval is None:
            self.context.announce(FINISHED_TOPIC, {"version": steps})


def update_seed(run_seed: int, update: int, rank: int) -> int:
    """Of torch's random stream in an update, where anything draws from it: a resumed run has it without saving it."""
    return int(np.random.SeedSequence((run_seed, update, rank)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def rates(num_flops: float, measured: dict[str, float], device: torch.device) -> dict[str, float]:
    """How busy a rank's device was while it was not waiting for rows. num_flops: the rank's, of the model."""
    per_s = num_flops / max(1e-9, measured["timing_s/update_actor"])
    peak = peak_flops(device)
    return {"perf/tflops/actor": per_s / 1e12} | ({} if peak is None else {"perf/mfu/actor": per_s / peak})


def num_tokens(rows: Rows) -> int:
    return len(rows["prompt_tokens"].values) + len(rows["response_tokens"].values)
