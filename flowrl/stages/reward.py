"""The reward stage: a response's text goes to the recipe's reward function; some samples are written for people.

Of several turns the function gets the last; where episodes give their own rewards, they are the rows'.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from controllers.context import WorkerContext
from flowrl.config import load
from flowrl.config.recipe import takes_episode_reward
from flowrl.data.datasets import Example, load_splits
from flowrl.data.prompts import PromptEncoder
from flowrl.record.samples import SampleLog
from flowrl.rewards.function import Score, load_reward
from flowrl.rollout.episodes.trajectory import last_turn
from transfer_queue.rows import Column, RowKey, Rows

MOST_ROWS = 64


class Reward:
    """Scores what is ready, in batches; with `reward.concurrency` each row by itself: none waits for another."""

    def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None:
        recipe = load(context.payload["recipe"])
        self.examples = load_splits(recipe.data, recipe.eval).train
        self.encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens)
        self.score_names = tuple(recipe.algorithm.score_weights)
        self.reward = None if takes_episode_reward(recipe) else load_reward(recipe.reward, Path.cwd())
        self.samples = SampleLog(context.run_dir / "samples.jsonl", every=recipe.run.samples_every)
        self.concurrency = recipe.reward.concurrency
        self.max_rows = 1 if self.concurrency > 1 else MOST_ROWS
        self._writing = threading.Lock()

    def process(self, rows: Rows) -> dict[str, Column]:
        examples = [self.examples[int(index)] for index in rows["data_index"].values]
        responses = [self.encoder.decode(tokens) for tokens in rows["response_tokens"]]
        scores = self._scores(rows, examples, responses)
        values = np.array([score.value for score in scores], dtype=np.float32)
        with self._writing:
            self.samples.write(rows, examples, responses, values)
        found = {"reward": Column.scalars(values)}
        if self.score_names:
            named = [self._named(score, key) for score, key in zip(scores, rows.keys, strict=True)]
            found["scores"] = Column.ragged(named, "float32")
        if "greedy_tokens" in rows:
            found["baseline"] = self._baselines(rows["greedy_tokens"], examples)
        return found

    def _scores(self, rows: Rows, examples: list[Example], responses: list[str]) -> list[Score]:
        """The episodes' own, or those of what the model wrote last: a tool's answers earn nothing by themselves."""
        if self.reward is None:
            return [Score(float(value)) for value in rows["episode_reward"].values]
        answers = [
            response if mask.all() else self.encoder.decode(last_turn(tokens, mask))
            for response, tokens, mask in zip(responses, rows["response_tokens"], rows["response_mask"], strict=True)
        ]
        return self.reward(examples, answers)

    def _named(self, score: Score, key: RowKey) -> list[float]:
        """The scores that the recipe weighs, in its order."""
        known = {"score": score.value, **score.details}
        for name in self.score_names:
            if name not in known:
                raise ValueError(
                    f"algorithm.advantage_settings.weights.{name}: the reward gave {', '.join(known)} for row {key}; "
                    "must give a score of that name for every row"
                )
        return [known[name] for name in self.score_names]

    def _baselines(self, greedy: Column, examples: list[Example]) -> Column:
        """What the greedy responses earn, on the rows that carry one."""
        assert self.reward is not None, "episodes score their own greedy responses"
        places = np.flatnonzero(greedy.lengths).tolist()
        scores = self.reward([examples[at] for at in places], [self.encoder.decode(greedy[at]) for at in places])
        baselines: list[list[float]] = [[] for _ in examples]
        for at, score in zip(places, scores, strict=True):
            baselines[at] = [score.value]
        return Column.ragged(baselines, "float32")

    def close(self) -> None:
        self.samples.close()
