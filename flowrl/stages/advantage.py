"""The advantage stage: rewards of whole groups in, one advantage a row out. Formulas: `flowrl/algorithms/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from controllers.context import WorkerContext
from flowrl.config import load
from flowrl.trainer.estimator import Estimator, per_group, shaped_scores
from transfer_queue.rows import Column, Rows


class GroupAdvantage:
    def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None:
        recipe = load(context.payload["recipe"])
        self.algorithm = recipe.algorithm
        self.max_tokens = recipe.rollout.max_tokens
        self.estimator = Estimator(recipe.algorithm)

    def process(self, rows: Rows) -> dict[str, Column]:
        reward_B = torch.from_numpy(rows["reward"].values)
        group_B = torch.tensor([key.group for key in rows.keys])
        more: dict[str, torch.Tensor] = {}
        if "response_mask" in rows:
            lengths = [int(np.count_nonzero(mask)) for mask in rows["response_mask"]]
            more["length_B"] = torch.tensor(lengths)
            reward_B = shaped_scores(reward_B, more["length_B"], self.algorithm, self.max_tokens)
        if "baseline" in rows:
            more["baseline_B"] = per_group(list(rows["baseline"]), group_B)
        advantage_B = self.estimator(reward_B, group_B, **more)
        return {"advantage": Column.scalars(advantage_B.numpy(), "float32")}
