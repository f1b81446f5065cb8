"""The evaluation stage: accuracy of pinned versions on held-out prompts, in a process and an engine of its own.

The trainer pins every version that is to be evaluated (a hard-linked directory). This stage takes pins oldest first,
whenever it gets to them, and removes each when it is done: training never waits for it, every evaluation is of one
named version, and a restart goes on where the last one stopped.
"""

from __future__ import annotations

import asyncio
import dataclasses
import statistics
from pathlib import Path
from typing import Any

from controllers.context import WorkerContext
from controllers.messages import FINISHED_TOPIC
from flowrl.config import Recipe, load
from flowrl.data.datasets import Example, load_splits
from flowrl.data.prompts import PromptEncoder
from flowrl.rewards.function import load_reward
from flowrl.rollout.engine import GenerateRequest, SamplingParams
from flowrl.rollout.engines import make_evaluation_engine
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
        self.encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens)
        held_out = load_splits(recipe.data, recipe.eval).held_out
        encoded = self.encoder.encode_all(held_out)
        self.prompts = encoded.prompts[: recipe.eval.limit]
        self.examples: list[Example] = [held_out[index] for index in encoded.indices[: recipe.eval.limit]]
        self.reward = load_reward(recipe.reward, Path.cwd())
        self.engine = make_evaluation_engine(recipe, context, max(map(len, self.prompts)))
        self.sampling = SamplingParams(
            max_tokens=recipe.rollout.max_tokens,
            temperature=recipe.eval.temperature,
            stop_token_ids=self.encoder.stop_token_ids,
        )

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        news = asyncio.Event()
        last: dict[str, Any] = {}

        def wake(payload: dict[str, Any], is_last: bool) -> None:
            if is_last:
                last.update(payload)
            news.set()

        self.context.on("published", lambda payload: loop.call_soon_threadsafe(wake, payload, False))
        self.context.on("trained", lambda payload: loop.call_soon_threadsafe(wake, payload, True))
        stopped = asyncio.ensure_future(loop.run_in_executor(None, self.context.stopping.wait))
        stopped.add_done_callback(lambda _: news.set())
        store = WeightStore(weights_root(self.recipe, self.context.session_dir), self.recipe.weights.buffers)
        self.context.ready()
        evaluated = -1
        while not self.context.stopping.is_set():
            for version, path in store.pinned(EVALUATION_PIN):
                await self._evaluate(version, path)
                store.unpin(version, EVALUATION_PIN)
                evaluated = version
            if last and evaluated >= int(last["version"]):
                self.context.announce(FINISHED_TOPIC, {"version": evaluated})
            with self.context.waiting_for("a version to evaluate"):
                await news.wait()
            news.clear()
        await self.engine.close()

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
        generations = await asyncio.gather(*(self.engine.generate(request) for request in requests))
        stale = {int(other) for generation in generations for other in generation.versions} - {version}
        assert not stale, f"evaluation of version {version} sampled tokens of versions {sorted(stale)}"
        examples = [example for example in self.examples for _ in range(self.settings.samples)]
        scores = self.reward(examples, [self.encoder.decode(generation.tokens) for generation in generations])
        accuracy = statistics.fmean(score.accuracy for score in scores)
        source = self.examples[0].data_source
        name = f"val-core/{source}/acc/mean@{self.settings.samples}"
        self.context.report({name: accuracy, "eval/version": float(version)}, version)
        self.context.announce("evaluated", {"version": version, "accuracy": accuracy, "prompts": len(self.examples)})
