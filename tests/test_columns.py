"""The table of columns is what the stages really write."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowrl.columns import COLUMNS
from flowrl.config import load
from flowrl.pipeline import ROLLOUT_COLUMNS, stages
from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes import Trajectory
from flowrl.stages.rollout import columns_of
from transfer_queue.rows import RowKey

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"

# Together they switch on every stage that writes.
VARIANTS = (
    (),
    ("rollout.filter_tied=true",),
    ("algorithm.name=segment_ppo",),
    ("reward.name=episode", "rollout.episode=mine.py:scored", "warm_start=null"),
)


def test_every_column_that_a_stage_writes_is_in_the_table_and_no_other() -> None:
    written = {
        column for overrides in VARIANTS for stage in stages(load(QUICKSTART, overrides)) for column in stage.writes
    }
    assert written == set(COLUMNS)


def test_rollout_writes_the_types_that_the_table_says() -> None:
    trajectory = Trajectory(
        tokens=np.array([4, 5]), mask=np.ones(2), logprobs=np.zeros(2), versions=np.zeros(2),
        finish_reason=FinishReason.STOP,
    )  # fmt: skip
    written = columns_of([(RowKey("train", 0, 0), 7, (1, 2, 3), trajectory)])
    assert {name: column.values.dtype.name for name, column in written.items()} == {
        name: COLUMNS[name].dtype for name in ROLLOUT_COLUMNS
    }
