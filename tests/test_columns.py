"""The table of columns is what the stages really write."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from flowrl.columns import COLUMNS
from flowrl.config import load
from flowrl.pipeline import ROLLOUT_COLUMNS, stages
from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes import Trajectory
from flowrl.rollout.finished import FinishedRow, columns_of
from transfer_queue.rows import RowKey

QUICKSTART = Path(__file__).resolve().parents[1] / "recipes" / "quickstart.yaml"

# Together they switch on every stage that writes.
VARIANTS = (
    (),
    ("rollout.filter_tied=true",),
    ("algorithm.name=segment_ppo",),
    ("algorithm.name=remax",),
    ("rollout.engine=sglang", "rollout.routed_experts=true"),
    ("algorithm.name=gdpo", "algorithm.advantage_settings.weights={score: 1.0}"),
    ("reward.name=episode", f"rollout.episode={__file__}:QUICKSTART", "warm_start=null"),
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
    row = FinishedRow(key=RowKey("train", 0, 0), index=7, prompt=(1, 2, 3), trajectory=trajectory, greedy=trajectory)
    written = columns_of([row], has_greedy=True)
    assert {name: column.values.dtype.name for name, column in written.items()} == {
        name: COLUMNS[name].dtype for name in (*ROLLOUT_COLUMNS, "greedy_tokens")
    }


def test_a_greedy_response_rides_on_one_row_and_its_versions_count() -> None:
    def trajectory(reward: float | None, *versions: int) -> Trajectory:
        return Trajectory(
            tokens=np.array([4, 0, 6]), mask=np.array([1, 0, 1]), logprobs=np.zeros(3), versions=np.array(versions),
            finish_reason=FinishReason.STOP, reward=reward,
        )  # fmt: skip

    def rows(reward: float | None) -> list[FinishedRow]:
        first, second, greedy = trajectory(reward, 5, 5, 6), trajectory(reward, 6, 6, 6), trajectory(reward, 4, 5, 5)
        return [
            FinishedRow(key=RowKey("train", 0, 0), index=0, prompt=(1,), trajectory=first, greedy=greedy),
            FinishedRow(key=RowKey("train", 0, 1), index=0, prompt=(1,), trajectory=second),
        ]

    assert [row.oldest_version for row in rows(None)] == [4, 6]
    assert [answer.tolist() for answer in columns_of(rows(None), has_greedy=True)["greedy_tokens"]] == [[6], []]
    assert [score.tolist() for score in columns_of(rows(0.5), has_greedy=True)["baseline"]] == [[0.5], []]
