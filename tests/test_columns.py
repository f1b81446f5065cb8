"""The table of columns is what the stages really write."""

from __future__ import annotations

import numpy as np

from flowrl.columns import COLUMNS
from flowrl.pipeline import ROLLOUT_COLUMNS, TRAIN_COLUMNS
from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes import Trajectory
from flowrl.stages.rollout import columns_of
from transfer_queue.rows import RowKey


def test_every_column_of_the_graph_is_in_the_table() -> None:
    assert {*ROLLOUT_COLUMNS, *TRAIN_COLUMNS, "episode_reward"} == set(COLUMNS)


def test_rollout_writes_the_types_that_the_table_says() -> None:
    trajectory = Trajectory(
        tokens=np.array([4, 5]), mask=np.ones(2), logprobs=np.zeros(2), versions=np.zeros(2),
        finish_reason=FinishReason.STOP,
    )  # fmt: skip
    written = columns_of([(RowKey("train", 0, 0), 7, (1, 2, 3), trajectory)])
    assert {name: column.values.dtype.name for name, column in written.items()} == {
        name: COLUMNS[name].dtype for name in ROLLOUT_COLUMNS
    }
