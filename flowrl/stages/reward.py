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
from flowrl.rewards.function import load_reward
from flowrl.rollout.episodes.trajectory import last_turn
from transfer_queue.rows import Column, Rows

MOST_ROWS = 64


class Reward:
    """Scores what is ready, in batches; with `reward.concurrency` each row by itself: none waits for another."""

    def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None:
        recipe = load(context.payload["recipe"])
        self.examples = load_splits(recipe.data, recipe.eval).train
        self.encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens)
        self.reward = None if takes_episode_reward(recipe) else load_reward(recipe.reward, Path.cwd())
        self.samples = SampleLog(context.run_dir / "samples.jsonl", every=recipe.run.samples_every)
        self.concurrency = recipe.reward.concurrency
        self.max_rows = 1 if self.concurrency > 1 else MOST_ROWS
        self._writing = threading.Lock()

    def process(self, rows: Rows) -> dict[str, Column]:
        examples = [self.examples[int(index)] for index in rows["data_index"].values]
        responses = [self.encoder.decode(tokens) for tokens in rows["response_tokens"]]
        scores = self._scores(rows, examples, responses)
        with self._writing:
            self.samples.write(rows, examples, responses, scores)
        return {"reward": Column.scalars(scores)}

    def _scores(self, rows: Rows, examples: list[Example], responses: list[str]) -> np.ndarray:
        """The episodes' own, or those of what the model wrote last: a tool's answers earn nothing by themselves."""
        if self.reward is None:
            return rows["episode_reward"].values
        answers = [
            response if mask.all() else self.encoder.decode(last_turn(tokens, mask))
            for response, tokens, mask in zip(responses, rows["response_tokens"], rows["response_mask"], strict=True)
        ]
        return np.array([score.value for score in self.reward(examples, answers)], dtype=np.float32)

    def close(self) -> None:
        self.samples.close()
