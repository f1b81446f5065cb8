"""The rollout stage: reserves room, samples groups of responses, puts them. One process, one engine.

    _admit    reserve groups as places are free        ->  _sample: one episode a sample
    _deliver  put what has finished since the last put
    _follow   new weights: load between two decode steps, then announce the version to the queue

Owns the engine and the order of these acts. What an episode is: `flowrl/rollout/episodes.py`. How tokens are made: the
engine. Whether there is room: the queue.
"""

from __future__ import annotations

import asyncio
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from controllers.context import WorkerContext
from controllers.dotted import load_attribute
from controllers.eventlog import EventLog
from flowrl.config import Recipe, load
from flowrl.data.datasets import load_splits
from flowrl.data.order import prompt_at
from flowrl.data.prompts import PromptEncoder
from flowrl.rollout.engine import Engine, FinishReason, GenerateRequest, PauseMode, SamplingParams
from flowrl.rollout.engines import make_engine
from flowrl.rollout.episodes import Episode, Trajectory
from transfer_queue.client import AsyncQueueClient
from transfer_queue.rows import Column, RowKey
from transfer_queue.wire import Reservation

RESERVE_WAIT_S = 30.0
BYTES_PER_RESPONSE_TOKEN = 4 + 1 + 4 + 4  # response_tokens, response_mask, rollout_logprobs, token_versions
FINISH_CODES = {FinishReason.STOP: 0, FinishReason.LENGTH: 1, FinishReason.ABORT: 2}


def main(context: WorkerContext) -> None:
    recipe = load(context.payload["recipe"])
    prompts = Prompts(recipe)
    context.report({"data/prompts": float(len(prompts.tokens)), "data/prompts_dropped": float(prompts.dropped)})
    if prompts.dropped:
        limit = recipe.data.max_prompt_tokens
        context.log(f"{prompts.dropped} prompts dropped: longer than data.max_prompt_tokens={limit}")
    asyncio.run(RolloutStage(context, recipe, prompts).run())


class Prompts:
    """The training prompts as tokens; a group's number says which is its own."""

    def __init__(self, recipe: Recipe) -> None:
        encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens)
        encoded = encoder.encode_all(load_splits(recipe.data, recipe.eval).train)
        self.stop_token_ids = encoder.stop_token_ids
        self.dropped = encoded.dropped
        self.tokens = encoded.prompts
        self.indices = encoded.indices
        self.seed = recipe.train.seed
        self.longest = max(map(len, self.tokens))

    def of_group(self, group: int) -> tuple[int, tuple[int, ...]]:
        """Row of the data set, and token ids."""
        position = prompt_at(group, len(self.tokens), self.seed)
        return self.indices[position], self.tokens[position]


class RolloutStage:
    """Lives in one asyncio loop. A group is running from its reservation until its last sample has finished."""

    def __init__(self, context: WorkerContext, recipe: Recipe, prompts: Prompts) -> None:
        self.context = context
        self.recipe = recipe
        self.prompts = prompts
        self.engine: Engine = make_engine(recipe, context, prompts.longest)
        self.episode: Episode = load_attribute(recipe.rollout.episode)
        self.sampling = SamplingParams(
            max_tokens=recipe.rollout.max_tokens,
            temperature=recipe.rollout.temperature,
            stop_token_ids=prompts.stop_token_ids,
        )
        self.events = EventLog(context.run_dir / "events.jsonl", context.node)
        self.running_groups = 0
        self.has_place = asyncio.Event()
        self.finished: list[tuple[RowKey, int, tuple[int, ...], Trajectory]] = []
        self.has_finished = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        published: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.context.on("published", lambda news: loop.call_soon_threadsafe(published.put_nowait, news))
        with self.context.waiting_for("the first weights"):
            first = await published.get()
        await self.engine.start(Path(first["path"]), first["version"])
        queue = AsyncQueueClient(self.context.queue_endpoints, secret=self.context.queue_secret)
        try:
            await queue.announce(self.context.name, self.engine.version)
            self.context.ready()
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(self._admit(queue, tasks)),
                    tasks.create_task(self._deliver(queue)),
                    tasks.create_task(self._follow(queue, published)),
                ]
                await loop.run_in_executor(None, self.context.stopping.wait)
                for task in loops:
                    task.cancel()
                await self.engine.abort()
        finally:
            await queue.close()
            await self.engine.close()
            self.events.close()

    async def _admit(self, queue: AsyncQueueClient, tasks: asyncio.TaskGroup) -> None:
        rollout = self.recipe.rollout
        row_bytes = BYTES_PER_RESPONSE_TOKEN * rollout.max_tokens + 4 * self.prompts.longest + 32
        while True:
            places = rollout.concurrency - self.running_groups
            if places == 0:
                self.has_place.clear()
                with self.context.waiting_for("responses to finish"):
                    await self.has_place.wait()
                continue
            with self.context.waiting_for("room in the queue"):
                reservations = await queue.reserve(
                    self.context.name, places, rollout.group_size, row_bytes=row_bytes, wait_s=RESERVE_WAIT_S
                )
            self.running_groups += len(reservations)
            for reservation in reservations:
                tasks.create_task(self._sample_group(reservation, tasks))

    async def _sample_group(self, reservation: Reservation, tasks: asyncio.TaskGroup) -> None:
        group, attempt = reservation.group, reservation.attempt
        index, prompt = self.prompts.of_group(group)
        samples = [
            tasks.create_task(self._sample(RowKey(reservation.partition, group, place, attempt), index, prompt))
            for place in range(reservation.group_size)
        ]
        await asyncio.gather(*samples)
        self.running_groups -= 1
        self.has_place.set()

    async def _sample(self, key: RowKey, index: int, prompt: tuple[int, ...]) -> None:
        self.events.write("dispatched", key, version=self.engine.version)
        request = GenerateRequest(
            request_id=f"{key.group}.{key.index}.{key.attempt}",
            tokens=prompt,
            sampling=dataclasses.replace(self.sampling, seed=sample_seed(self.recipe.train.seed, key)),
        )
        trajectory = await self.episode(self.engine, request)
        self.events.write("sampled", key, versions=trajectory.spans())
        self.finished.append((key, index, prompt, trajectory))
        self.has_finished.set()

    async def _deliver(self, queue: AsyncQueueClient) -> None:
        """One put for all that finished since the last: rows never wait for each other, and small puts are few."""
        while True:
            await self.has_finished.wait()
            self.has_finished.clear()
            batch, self.finished = self.finished, []
            keys = [key for key, *_ in batch]
            self.events.flush()  # a row that others can see has its history in the log, should this process die now
            oldest = [int(trajectory.versions.min()) for *_, trajectory in batch]
            await queue.put(keys, columns_of(batch), oldest)

    async def _follow(self, queue: AsyncQueueClient, published: asyncio.Queue[dict[str, Any]]) -> None:
        """Loads the newest weights; of several that arrived meanwhile, only the last."""
        mode = PauseMode(self.recipe.rollout.in_flight)
        while True:
            news = await published.get()
            while not published.empty():
                news = published.get_nowait()
            if news["version"] <= self.engine.version:
                continue
            await self.engine.load_weights(Path(news["path"]), news["version"], mode)
            await queue.announce(self.context.name, self.engine.version)


def sample_seed(run_seed: int, key: RowKey) -> int:
    """A seed for every sample, the same wherever and whenever it is drawn."""
    sequence = np.random.SeedSequence((run_seed, key.group, key.index, key.attempt))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))


def columns_of(batch: list[tuple[RowKey, int, tuple[int, ...], Trajectory]]) -> dict[str, Column]:
    trajectories = [trajectory for *_, trajectory in batch]
    return {
        "data_index": Column.scalars([index for _, index, *_ in batch], "int64"),
        "prompt_tokens": Column.ragged([prompt for _, _, prompt, _ in batch], "int32"),
        "response_tokens": Column.ragged([trajectory.tokens for trajectory in trajectories], "int32"),
        "response_mask": Column.ragged([trajectory.mask for trajectory in trajectories], "uint8"),
        "rollout_logprobs": Column.ragged([trajectory.logprobs for trajectory in trajectories], "float32"),
        "token_versions": Column.ragged([trajectory.versions for trajectory in trajectories], "int32"),
        "finish_reason": Column.scalars(
            [FINISH_CODES[trajectory.finish_reason] for trajectory in trajectories], "uint8"
        ),
    }
