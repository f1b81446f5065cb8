"""Routed experts on their way from an engine's answers to a row."""

from __future__ import annotations

import numpy as np

from flowrl.config import load
from flowrl.pipeline import stages
from flowrl.rollout.engine import FinishReason, Generation
from flowrl.rollout.episodes import Transcript
from flowrl.rollout.experts import UNKNOWN, joined_experts
from flowrl.rollout.finished import FinishedRow, columns_of
from transfer_queue.rows import RowKey


def generation(num_tokens: int, experts: np.ndarray | None, reason: FinishReason = FinishReason.STOP) -> Generation:
    return Generation(
        tokens=np.arange(num_tokens, dtype=np.int32),
        logprobs=np.zeros(num_tokens, dtype=np.float32),
        versions=np.zeros(num_tokens, dtype=np.int32),
        finish_reason=reason,
        routed_experts=experts,
    )


def routed(num_tokens: int, value: int) -> np.ndarray:
    """Two layers, three experts a token."""
    return np.full((num_tokens, 2, 3), value, dtype=np.int32)


def test_the_first_to_read_a_token_says_its_experts_and_what_none_read_is_unknown() -> None:
    parts = [generation(4, routed(6, 1)), generation(2, None), generation(3, routed(10, 2))]
    joined = joined_experts(parts, num_tokens=14)
    assert joined is not None and joined.shape == (13, 2, 3)
    assert joined[:, 0, 0].tolist() == [1] * 6 + [2] * 4 + [UNKNOWN] * 3
    assert joined_experts([generation(4, None)], num_tokens=7) is None


def test_a_row_has_the_experts_of_all_turns_flat_and_one_without_them_has_none() -> None:
    transcript = Transcript((7, 8, 9), max_tokens=20)
    transcript.write(generation(4, routed(3 + 4 - 1, 1)))
    assert transcript.read([5, 6])
    transcript.write(generation(3, routed(3 + 4 + 2 + 3 - 1, 2)))
    whole = transcript.trajectory()
    silent = Transcript((7, 8), max_tokens=20)
    silent.write(generation(2, None, FinishReason.ABORT))
    trajectories = (whole, silent.trajectory())
    batch = [
        FinishedRow(key=RowKey("train", 0, index), index=0, prompt=one.prompt or (), trajectory=one)
        for index, one in enumerate(trajectories)
    ]
    column = columns_of(batch)["routed_experts"]
    assert column.values.dtype == np.int16
    assert column[0].reshape(-1, 2, 3)[:, 1, 2].tolist() == [1] * 6 + [2] * 5 and not len(column[1])
    assert "routed_experts" not in columns_of(batch[1:])


def test_rollout_declares_the_column_where_the_recipe_asks_for_it() -> None:
    def written(*overrides: str) -> tuple[str, ...]:
        recipe = load("recipes/quickstart.yaml", ["rollout.engine=sglang", *overrides])
        return next(stage.writes for stage in stages(recipe) if stage.name == "rollout")

    assert "routed_experts" in written("rollout.routed_experts=true")
    assert "routed_experts" not in written()
