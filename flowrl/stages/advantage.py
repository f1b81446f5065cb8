"""The advantage stage: rewards of whole groups in, one advantage a row out. The formula is in `flowrl/algorithms/`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from controllers.context import WorkerContext
from flowrl.algorithms import advantages
from flowrl.config import load
from transfer_queue.rows import Column, Rows


class GroupAdvantage:
    def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None:
        self.divide_by_std = load(context.payload["recipe"]).algorithm.name == "grpo"

    def process(self, rows: Rows) -> dict[str, Column]:
        reward_B = torch.from_numpy(rows["reward"].values)
        group_B = torch.tensor([key.group for key in rows.keys])
        advantage_B = advantages.grpo(reward_B, group_B, divide_by_std=self.divide_by_std)
        return {"advantage": Column.scalars(advantage_B.numpy(), "float32")}
