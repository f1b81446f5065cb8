"""The rollout stage: reserves room, samples groups of responses, puts them. One process, one engine.

    _admit    reserve groups as places are free        ->  _sample: one episode a sample
    _deliver  put what has finished since the last put
    _follow   new weights: load between two decode steps, then announce the version to the queue
    _alternate  instead of it, where a trainer rank shares the device: in between it trains

Owns the engine and the order of these acts. What an episode is: `flowrl/rollout/episodes/`. How tokens are made: the
engine. Whether there is room: the queue.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
from contextlib import suppress
from typing import Any

import numpy as np

from controllers.context import WorkerContext
from flowrl.config import Recipe, load
from flowrl.config.recipe import hands_over_batches, is_strict, needs_segments
from flowrl.data.datasets import load_splits
from flowrl.data.order import prompt_at
from flowrl.data.prompts import PromptEncoder
from flowrl.determinism import fix_kernels
from flowrl.rollout.engine import Engine, GenerateRequest, PauseMode, SamplingParams
from flowrl.rollout.engines import make_engine
from flowrl.rollout.episodes import Failure, Trajectory
from flowrl.rollout.episodes.runner import EpisodeRunner
from flowrl.rollout.finished import FinishedRow, columns_of
from flowrl.rollout.scheduling.groups import first_to_end
from flowrl.rollout.scheduling.surplus import is_overdue
from flowrl.rollout.shares import Shares
from flowrl.stages.sources import make_source
from flowrl.stages.turns import EngineTurn
from transfer_queue.async_client import AsyncQueueClient
from transfer_queue.rows import RowKey
from transfer_queue.wire import Reservation

RESERVE_WAIT_S = 30.0
BYTES_PER_RESPONSE_TOKEN = 4 + 1 + 4 + 4  # response_tokens, response_mask, rollout_logprobs, token_versions
GREEDY = "greedy"


def main(context: WorkerContext) -> None:
    recipe = load(context.payload["recipe"]).producer(context.worker)
    fix_kernels(recipe)
    episodes = EpisodeRunner(recipe, context.log, context.report)
    prompts = Prompts(recipe, episodes.encoder)
    context.report({"data/prompts": float(len(prompts.tokens)), "data/prompts_dropped": float(prompts.dropped)})
    if prompts.dropped:
        limit = recipe.data.max_prompt_tokens
        context.log(f"{prompts.dropped} prompts dropped: longer than data.max_prompt_tokens={limit}")
    asyncio.run(RolloutStage(context, recipe, prompts, episodes).run())


class Prompts:
    """The training prompts as tokens; a group's number says which is its own."""

    def __init__(self, recipe: Recipe, encoder: PromptEncoder) -> None:
        self.examples = load_splits(recipe.data, recipe.eval).train
        encoded = encoder.encode_all(self.examples)
        self.stop_token_ids = encoder.stop_token_ids
        self.dropped = encoded.dropped
        self.tokens = encoded.prompts
        self.indices = encoded.indices
        self.seed = recipe.train.seed
        has_others = recipe.rollout.environment is not None  # it may put its own in their place
        self.longest = recipe.data.max_prompt_tokens if has_others else max(map(len, self.tokens))

    def of_group(self, group: int) -> tuple[int, tuple[int, ...]]:
        """Row of the data set, and token ids."""
        position = prompt_at(group, len(self.tokens), self.seed)
        return self.indices[position], self.tokens[position]


class RolloutStage:
    """Lives in one asyncio loop. A group is running from its reservation until its last sample has finished."""

    def __init__(self, context: WorkerContext, recipe: Recipe, prompts: Prompts, episodes: EpisodeRunner) -> None:
        self.context = context
        self.recipe = recipe
        self.prompts = prompts
        self.episodes = episodes
        self.engine: Engine = episodes.serving(make_engine(recipe, context, prompts.longest))
        self.source = make_source(context, recipe)
        self.sampling = SamplingParams(
            max_tokens=recipe.rollout.max_tokens,
            temperature=recipe.rollout.temperature,
            stop_token_ids=prompts.stop_token_ids,
            stop_strings=tuple(recipe.rollout.stop_strings),
        )
        self.has_greedy = recipe.algorithm.has_greedy_baseline
        self.events = context.event_log()
        self.turn = EngineTurn(context, self.events)
        # Reserved whole and put whole where the recipe says so; new weights are loaded in between.
        self.shares = Shares(context, recipe, lambda: self.row_bytes) if hands_over_batches(recipe) else None
        self.takes_weights = asyncio.Lock()
        self.running: dict[asyncio.Task[None], Reservation] = {}
        self.has_place = asyncio.Event()
        self.finished: list[FinishedRow] = []
        self.has_finished = asyncio.Event()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        published: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self.context.on("published", lambda news: loop.call_soon_threadsafe(published.put_nowait, news))
        self.turn.listen()
        with self.context.waiting_for("the first weights"):
            await self._start_engine(published)
        queue = AsyncQueueClient(self.context.queue_endpoints, secret=self.context.queue_secret)
        try:
            await self._announce(queue)
            self.context.ready()
            async with asyncio.TaskGroup() as tasks:
                loops = [
                    tasks.create_task(self._admit(queue, tasks) if self.shares is None else self._admit_shares(queue)),
                    tasks.create_task(self._deliver(queue)),
                    tasks.create_task((self._alternate if self.turn.is_shared else self._follow)(queue, published)),
                ]
                await self.context.stopped()
                for task in loops:
                    task.cancel()
                self.episodes.stop()
                await self.engine.abort()
        finally:
            await queue.close()
            await self.engine.close()
            self.source.close()
            self.episodes.close()
            self.events.close()

    async def _admit(self, queue: AsyncQueueClient, tasks: asyncio.TaskGroup) -> None:
        rollout = self.recipe.rollout
        while True:
            places = rollout.concurrency - len(self.running)
            if places == 0:
                self.has_place.clear()
                with self.context.waiting_for("responses to finish"):
                    await self.has_place.wait()
                continue
            with self.context.waiting_for("room in the queue"):
                reservations = await queue.reserve(
                    self.context.name, places, rollout.group_size, row_bytes=self.row_bytes, wait_s=RESERVE_WAIT_S
                )
            for reservation in reservations:
                task = tasks.create_task(self._sample_group(reservation, queue))
                self.running[task] = reservation
                task.add_done_callback(self._leave)

    def _leave(self, task: asyncio.Task[None]) -> None:
        del self.running[task]
        self.has_place.set()

    def _give_up_overdue(self) -> None:
        """The queue has dropped these, or is about to; their places are for those that can still be trained."""
        for task, reservation in self.running.items():
            if is_overdue(reservation.deadline, self.engine.version):
                task.cancel()

    async def _admit_shares(self, queue: AsyncQueueClient) -> None:
        """One whole share after the other; its samples reach the engine together, and the queue together."""
        assert self.shares is not None, "only where batches are handed over"
        self.shares.listen()
        while True:
            share = await self.shares.reserve(queue)
            async with self.takes_weights:
                groups = await asyncio.gather(*(self._run_group(reservation) for reservation in share))
                failures = [failure for failure in groups if failure is not None]
                if failures:
                    raise RuntimeError(f"an episode failed, and its share is not whole: {failures[0]}")
                self.has_finished.set()

    async def _sample_group(self, reservation: Reservation, queue: AsyncQueueClient) -> None:
        """A group is whole or nothing: where too many episodes fail the others end, and its prompt is tried again."""
        failure = await self._run_group(reservation)
        if failure is not None:
            await queue.drop(reservation.keys[:1], f"episode_failed:{failure.reason}", again=True)

    async def _run_group(self, reservation: Reservation) -> Failure | None:
        """Its samples at once; beside them, where the algorithm wants one, the greedy response, for which the first row
        waits."""
        index, prompt = self.prompts.of_group(reservation.group)
        keys = reservation.keys
        for key in keys:
            self.events.write("dispatched", key, version=self.engine.version)
        candidates = [self._generate(key, index, prompt) for key in (*keys, *self._spares(reservation))]
        if not self.has_greedy:
            return await first_to_end(
                candidates, len(keys), lambda place, trajectory: self._finish(keys[place], index, prompt, trajectory)
            )
        first: list[Trajectory] = []

        def accept(place: int, trajectory: Trajectory) -> None:
            if place:
                self._finish(keys[place], index, prompt, trajectory)
            else:
                first.append(trajectory)

        greedy = asyncio.create_task(self._generate(keys[0], index, prompt, is_greedy=True))
        try:
            failure = await first_to_end(candidates, len(keys), accept)
            baseline = failure or await greedy
        finally:
            greedy.cancel()
        if isinstance(baseline, Failure):
            return baseline
        self._finish(keys[0], index, prompt, first[0], baseline)
        return None

    def _spares(self, reservation: Reservation) -> list[RowKey]:
        """Names of samples beyond those that are reserved; the queue never hears of them."""
        size = reservation.group_size
        places = range(size, size + self.recipe.rollout.redundancy)
        return [RowKey(reservation.partition, reservation.group, place, reservation.attempt) for place in places]

    async def _generate(
        self, key: RowKey, index: int, prompt: tuple[int, ...], *, is_greedy: bool = False
    ) -> Trajectory | Failure:
        sampling = dataclasses.replace(self.sampling, seed=self._seed(key))
        request = GenerateRequest(
            request_id=f"{key.group}.{GREEDY if is_greedy else key.index}.{key.attempt}",
            tokens=prompt,
            sampling=dataclasses.replace(sampling, temperature=0.0) if is_greedy else sampling,
        )
        return await self.episodes.run(self.engine, request, self.prompts.examples[index])

    def _finish(
        self,
        key: RowKey,
        index: int,
        prompt: tuple[int, ...],
        trajectory: Trajectory,
        greedy: Trajectory | None = None,
    ) -> None:
        self.events.write("sampled", key, versions=trajectory.spans())
        row = FinishedRow(
            key=key, index=index, prompt=trajectory.prompt or prompt, trajectory=trajectory, greedy=greedy
        )
        self.finished.append(row)
        if self.shares is None:
            self.has_finished.set()

    def _seed(self, key: RowKey) -> int:
        """Of a run that is to be repeatable, the attempt is no part: it tells of accidents."""
        seeded = key if not is_strict(self.recipe) else RowKey(key.partition, key.group, key.index)
        return sample_seed(self.recipe.train.seed, seeded)

    async def _deliver(self, queue: AsyncQueueClient) -> None:
        """One put for all that finished since the last: rows never wait for each other, and small puts are few."""
        while True:
            await self.has_finished.wait()
            self.has_finished.clear()
            batch, self.finished = self.finished, []
            self.events.flush()  # a row that others can see has its history in the log, should this process die now
            columns = columns_of(batch, has_greedy=self.has_greedy)
            await queue.put([row.key for row in batch], columns, [row.oldest_version for row in batch])

    async def _follow(self, queue: AsyncQueueClient, published: asyncio.Queue[dict[str, Any]]) -> None:
        """Loads the newest weights; of several that arrived meanwhile, only the last."""
        mode = PauseMode(self.recipe.rollout.in_flight)
        while True:
            news = await published.get()
            while not published.empty():
                news = published.get_nowait()
            if news["version"] <= self.engine.version:
                continue
            try:
                async with self.takes_weights:
                    await self.source.load(self.engine, news, mode)
            except FileNotFoundError:
                continue  # its turn has ended: a newer one has been announced
            self._give_up_overdue()
            await self._announce(queue)

    async def _alternate(self, queue: AsyncQueueClient, published: asyncio.Queue[dict[str, Any]]) -> None:
        """New weights come of the trainer's turn at the device; in it the engine has neither work nor memory."""
        mode = PauseMode(self.recipe.rollout.in_flight)
        # At a bound of 0 nothing runs when a batch is whole, and the recipe may say `keep`; its KV would go anyway.
        pause = PauseMode.RECOMPUTE if mode is PauseMode.KEEP else mode
        while True:
            await self.turn.asked()
            async with self.takes_weights:
                await self.engine.pause(pause)
                await self.engine.release_memory()
                self.turn.give()
                version = await self.turn.begin()
                await self.engine.resume_memory()
                await self._load_newest(published, version, pause)
                await self.engine.resume()
            await self._announce(queue)

    async def _load_newest(self, published: asyncio.Queue[dict[str, Any]], least: int, mode: PauseMode) -> None:
        """The newest version, from `least` on."""
        while self.engine.version < least:
            news = await published.get()
            if news["version"] < least or not published.empty():
                continue
            with suppress(FileNotFoundError):
                await self.source.load(self.engine, news, mode)

    async def _start_engine(self, published: asyncio.Queue[dict[str, Any]]) -> None:
        """On the first version that is still there; where devices are shared, on what the trainer has published last,
        for there will be no other before the engine has worked."""
        least = await self.turn.begin()
        while self.engine.version < 0:
            news = await published.get()
            if news["version"] < least:
                continue
            try:
                await self.source.start(self.engine, news)
            except FileNotFoundError:
                continue

    async def _announce(self, queue: AsyncQueueClient) -> None:
        await queue.announce(self.context.name, self.engine.version)
        if self.shares is not None:
            self.shares.loaded(self.engine.version)

    @property
    def row_bytes(self) -> int:
        """The most that a row's columns take."""
        per_token = BYTES_PER_RESPONSE_TOKEN + 4 * (needs_segments(self.recipe) + self.has_greedy)
        says_experts = self.recipe.rollout.routed_experts  # of prompt and response alike
        experts = 2 * math.prod(self.engine.capabilities.routed_experts or (0,)) if says_experts else 0
        longest_prompt, longest = self.prompts.longest, self.recipe.rollout.max_tokens
        return (per_token + experts) * longest + (4 + experts) * longest_prompt + 32


def sample_seed(run_seed: int, key: RowKey) -> int:
    """A seed for every sample, the same wherever and whenever it is drawn."""
    sequence = np.random.SeedSequence((run_seed, key.group, key.index, key.attempt))
    return int(sequence.generate_state(1, np.uint64)[0] >> np.uint64(1))
