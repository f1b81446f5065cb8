"""The proximal stage, for `segment_ppo`: log-probs of tokens under the version after the one that sampled them.

    take     rows as they finish, and acknowledge them at once: the column is optional, and nothing waits for it
    compute  for every version v that has tokens here: load v + 1 from where it is published, score those rows
    put      a row's column once it has all that an update could want; NaN where v + 1 had gone

One process with a model of its own, beside engines and trainer. If it falls behind, or dies, rows train with their own
sampling log-probs instead: less correction, never a wait.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from controllers.context import WorkerContext
from flowrl.config import Recipe, load
from flowrl.stages.segments import HeldRow, Segments
from flowrl.trainer.model import Policy, load_lm
from flowrl.trainer.packing import samples_from_rows
from flowrl.trainer.scoring import score_responses
from flowrl.weights.loading import load_in_place
from transfer_queue.client import QueueClient
from transfer_queue.rows import Column, Rows

STAGE = "proximal"
MAX_ROWS = 1024
# How long a new version may lie before it is noticed when no rows come.
WAIT_S = 0.25


def main(context: WorkerContext) -> None:
    ProximalStage(context, load(context.payload["recipe"])).run()


class ProximalStage:
    def __init__(self, context: WorkerContext, recipe: Recipe) -> None:
        self.context = context
        self.budget = recipe.train.micro_batch_tokens
        policy = Policy(load_lm(recipe.model.path), recipe.rollout.temperature)
        self.policy = policy.to(context.device).requires_grad_(False)
        self.loaded = -1
        self.segments = Segments(recipe.staleness.max)
        self.published: dict[int, Path] = {}
        context.on("published", lambda news: self.published.update({int(news["version"]): Path(news["path"])}))

    def run(self) -> None:
        self.context.ready()
        with QueueClient(self.context.queue_endpoints, secret=self.context.queue_secret) as queue:
            while not self.context.stopping.is_set():
                with self.context.waiting_for("rows to recompute"):
                    rows = queue.take(STAGE, max_rows=MAX_ROWS, wait_s=WAIT_S).rows
                if len(rows):
                    queue.ack(STAGE, rows.keys)
                    self.segments.add(held_rows(rows))
                self.settle()
                self.put(queue)

    def settle(self) -> None:
        """Scores what the published versions allow."""
        published = dict(self.published)
        if not published:
            return
        for version, rows in self.segments.owed(max(published)):
            is_there = self.load(version + 1, published.get(version + 1))
            self.segments.settle(version, rows, self.logprobs(rows) if is_there else None)

    def load(self, version: int, path: Path | None) -> bool:
        """False if that version was never announced here, or has been removed."""
        if version == self.loaded:
            return True
        if path is None:
            return False
        try:
            load_in_place(self.policy.lm.state_dict(keep_vars=True), path)
        except FileNotFoundError:
            return False
        self.loaded = version
        return True

    def logprobs(self, rows: list[HeldRow]) -> list[np.ndarray]:
        samples = [row.sample for row in rows]
        return score_responses(lambda packed: self.policy(packed)[0], samples, self.budget, self.policy.lm.device)

    def put(self, queue: QueueClient) -> None:
        rows = self.segments.finished()
        if rows:
            column = Column.ragged([row.value_T for row in rows], "float32")
            queue.put([row.key for row in rows], {"segment_proximal_logprobs": column})


def held_rows(rows: Rows) -> list[HeldRow]:
    versions = rows["token_versions"]
    return [HeldRow.of(sample, versions[place]) for place, sample in enumerate(samples_from_rows(rows))]
