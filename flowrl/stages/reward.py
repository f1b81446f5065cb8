"""The reward stage: a response's text goes to the recipe's reward function; some samples are written for people."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from controllers.context import WorkerContext
from flowrl.config import load
from flowrl.data.datasets import load_splits
from flowrl.data.prompts import PromptEncoder
from flowrl.record.samples import SampleLog
from flowrl.rewards.function import load_reward
from transfer_queue.rows import Column, Rows


class Reward:
    def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None:
        recipe = load(context.payload["recipe"])
        self.examples = load_splits(recipe.data, recipe.eval).train
        self.encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens)
        self.reward = load_reward(recipe.reward, Path.cwd())
        self.samples = SampleLog(context.run_dir / "samples.jsonl", every=recipe.run.samples_every)

    def process(self, rows: Rows) -> dict[str, Column]:
        examples = [self.examples[int(index)] for index in rows["data_index"].values]
        responses = [self.encoder.decode(tokens) for tokens in rows["response_tokens"]]
        scores = np.array([score.value for score in self.reward(examples, responses)], dtype=np.float32)
        self.samples.write(rows, examples, responses, scores)
        return {"reward": Column.scalars(scores)}

    def close(self) -> None:
        self.samples.close()
