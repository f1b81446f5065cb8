"""What rollout puts of a response that has ended: the row's columns. Owns their dtypes on the way in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes.trajectory import Trajectory, last_turn
from transfer_queue.rows import Column, RowKey

FINISH_CODES = {FinishReason.STOP: 0, FinishReason.LENGTH: 1, FinishReason.ABORT: 2}


@dataclass(frozen=True, kw_only=True)
class FinishedRow:
    """index: of the prompt in the data set. greedy: the prompt's greedy response, on one row of a group, where the
    algorithm wants one."""

    key: RowKey
    index: int
    prompt: tuple[int, ...]
    trajectory: Trajectory
    greedy: Trajectory | None = None

    @property
    def oldest_version(self) -> int:
        """Of all tokens that the row's update depends on."""
        sampled = [self.trajectory, *([self.greedy] if self.greedy else [])]
        return min(int(trajectory.versions.min()) for trajectory in sampled)


def columns_of(rows: Sequence[FinishedRow], *, has_greedy: bool = False) -> dict[str, Column]:
    trajectories = [row.trajectory for row in rows]
    return {
        "data_index": Column.scalars([row.index for row in rows], "int64"),
        "prompt_tokens": Column.ragged([row.prompt for row in rows], "int32"),
        "response_tokens": Column.ragged([trajectory.tokens for trajectory in trajectories], "int32"),
        "response_mask": Column.ragged([trajectory.mask for trajectory in trajectories], "uint8"),
        "rollout_logprobs": Column.ragged([trajectory.logprobs for trajectory in trajectories], "float32"),
        "token_versions": Column.ragged([trajectory.versions for trajectory in trajectories], "int32"),
        "finish_reason": Column.scalars(
            [FINISH_CODES[trajectory.finish_reason] for trajectory in trajectories], "uint8"
        ),
        **_episode_rewards(trajectories),
        **_routed_experts(trajectories),
        **(_greedy(rows) if has_greedy else {}),
    }


def _episode_rewards(trajectories: Sequence[Trajectory]) -> dict[str, Column]:
    """A column only where episodes give rewards; then all do."""
    rewards = [trajectory.reward for trajectory in trajectories if trajectory.reward is not None]
    return {"episode_reward": Column.scalars(rewards, "float32")} if rewards else {}


def _routed_experts(trajectories: Sequence[Trajectory]) -> dict[str, Column]:
    """A column only where the engine says them; a row that was aborted before it began has none."""
    experts = [trajectory.routed_experts for trajectory in trajectories]
    if all(one is None for one in experts):
        return {}
    rows = [np.empty(0, np.int16) if one is None else one.reshape(-1) for one in experts]
    return {"routed_experts": Column.ragged(rows, "int16")}


def _greedy(rows: Sequence[FinishedRow]) -> dict[str, Column]:
    """The greedy response's answer, for the reward function; or its reward, where episodes give one."""
    if rows[0].trajectory.reward is not None:
        baselines = [[] if row.greedy is None else [row.greedy.reward or 0.0] for row in rows]
        return {"baseline": Column.ragged(baselines, "float32")}
    none = np.empty(0, np.int32)
    answers = [none if row.greedy is None else last_turn(row.greedy.tokens, row.greedy.mask) for row in rows]
    return {"greedy_tokens": Column.ragged(answers, "int32")}
