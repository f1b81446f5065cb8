"""The evaluation stage: accuracy of pinned versions on held-out prompts, in a process and an engine of its own.

The trainer pins every version that is to be evaluated (a hard-linked directory). This stage takes pins oldest first,
whenever it gets to them, and removes each when it is done: training never waits for it, every evaluation is of one
named version, and a restart goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from controllers.context import WorkerContext
from controllers.messages import FINISHED_TOPIC
from flowrl.config import Recipe, load
from flowrl.config.recipe import takes_episode_reward
from flowrl.data.datasets import Example, load_splits
from flowrl.rewards.function import load_reward
from flowrl.rollout.engine import GenerateRequest, SamplingParams
from flowrl.rollout.engines import make_evaluation_engine
from flowrl.rollout.episodes import Failure, Trajectory
from flowrl.rollout.episodes.runner import EpisodeRunner
from flowrl.rollout.episodes.trajectory import last_turn
from flowrl.weights.place import EVALUATION_PIN, weights_root
from flowrl.weights.store import WeightStore


def main(context: WorkerContext) -> None:
    asyncio.run(Evaluation(context, load(context.payload["recipe"])).run())


class Evaluation:
    def __init__(self, context: WorkerContext, recipe: Recipe) -> None:
        assert recipe.eval is not None, "the graph has this stage only for recipes that evaluate"
        self.context = context
        self.settings = recipe.eval
        self.recipe = recipe
        self.episodes = EpisodeRunner(recipe, context.log)
        held_out = load_splits(recipe.data, recipe.eval).held_out
        encoded = self.episodes.encoder.encode_all(held_out)
        self.prompts = encoded.prompts[: recipe.eval.limit]
        self.examples: list[Example] = [held_out[index] for index in encoded.indices[: recipe.eval.limit]]
        self.reward = None if takes_episode_reward(recipe) else load_reward(recipe.reward, Path.cwd())
        longest = max(map(len, self.prompts)) if recipe.rollout.environment is None else recipe.data.max_prompt_tokens
        self.engine = make_evaluation_engine(recipe, context, longest)
        self.sampling = SamplingParams(
            max_tokens=recipe.rollout.max_tokens,
            temperature=recipe.eval.temperature,
            stop_token_ids=self.episodes.encoder.stop_token_ids,
            stop_strings=tuple(recipe.rollout.stop_strings),
        )

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        newest: dict[str, int] = {"trained": -1, "evaluated": -1}

        def wake(topic: str, payload: dict[str, Any]) -> None:
            newest[topic] = int(payload["version"])
            news.set()

        # What this process's predecessor has evaluated counts too: it may have died before it said that all was done.
        for topic in ("published", "trained", "evaluated"):
            heard = partial(wake, topic)
            self.context.on(topic, partial(loop.call_soon_threadsafe, heard))
        stopped = asyncio.ensure_future(self.context.stopped())
        stopped.add_done_callback(lambda _: news.set())
        store = WeightStore(weights_root(self.recipe, self.context.session_dir), self.recipe.weights.buffers)
        self.context.ready()
        while True:
            # Before the first is published, what lies on a shared disk may be an earlier life's, and is cleared away.
            with self.context.waiting_for("a version to evaluate"):
                await news.wait()
            news.clear()
            if self.context.stopping.is_set():
                break
            for version, path in store.pinned(EVALUATION_PIN):
                await self._evaluate(version, path)
                store.unpin(version, EVALUATION_PIN)
            if 0 <= newest["trained"] <= newest["evaluated"]:
                self.context.announce(FINISHED_TOPIC, {"version": newest["evaluated"]})
        await self.engine.close()
        self.episodes.close()

    def _accuracies(self, examples: list[Example], outcomes: list[Trajectory | Failure]) -> list[float]:
        """One for each; a failed episode solved nothing."""
        done = [(at, outcome) for at, outcome in enumerate(outcomes) if isinstance(outcome, Trajectory)]
        accuracies = [0.0] * len(outcomes)
        if self.reward is None:
            for at, trajectory in done:
                accuracies[at] = float((trajectory.reward or 0.0) >= 1.0)
            return accuracies
        answers = [self.episodes.encoder.decode(last_turn(one.tokens, one.mask)) for _, one in done]
        scores = self.reward([examples[at] for at, _ in done], answers)
        for (at, _), score in zip(done, scores, strict=True):
            accuracies[at] = score.accuracy
        return accuracies

    async def _evaluate(self, version: int, path: Path) -> None:
        if self.engine.version < 0:
            await self.engine.start(path, version)
        else:
            await self.engine.load_weights(path, version)
        requests = [
            GenerateRequest(
                request_id=f"{version}.{index}.{sample}",
                tokens=prompt,
                sampling=dataclasses.replace(self.sampling, seed=index * self.settings.samples + sample),
            )
            for index, prompt in enumerate(self.prompts)
            for sample in range(self.settings.samples)
        ]
        examples = [example for example in self.examples for _ in range(self.settings.samples)]
        outcomes = await asyncio.gather(
            *(self.episodes.run(self.engine, *one) for one in zip(requests, examples, strict=True))
        )
        trajectories = [outcome for outcome in outcomes if isinstance(outcome, Trajectory)]
        stale = {other for trajectory in trajectories for other, _ in trajectory.spans()} - {version}
        assert not stale, f"evaluation of version {version} sampled tokens of versions {sorted(stale)}"
        accuracy = statistics.fmean(self._accuracies(examples, outcomes))
        source = self.examples[0].data_source
        name = f"val-core/{source}/acc/mean@{self.settings.samples}"
        self.context.report({name: accuracy, "eval/version": float(version)}, version)
        self.context.announce("evaluated", {"version": version, "accuracy": accuracy, "prompts": len(self.examples)})
