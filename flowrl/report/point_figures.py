"""The figures of one run that a sweep compares. Each is None where the run did not get so far as to have it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowrl.report.events import read_events
from flowrl.report.idle import mapped_idle_shares, rollout_idle_share, train_idle_share
from flowrl.report.record import RunRecord, Series

TRAILING = 10  # updates that a smoothed reward looks back over
FINAL = 0.1  # share of the updates that count as the end


@dataclass(frozen=True, kw_only=True)
class PointFigures:
    """updates: done. reward: smoothed over the last ten updates, by seconds since the first update began.
    reward_final: mean over the last tenth of the updates. tokens_per_s: prompts and responses, trained. idle: share of
    the time, by stage, of those that are known."""

    updates: int
    reward: Series
    reward_final: float | None
    accuracy_before: float | None
    accuracy_after: float | None
    training_s: float | None
    tokens_per_s: float | None
    idle: Mapping[str, float]
    mean_staleness: float | None
    max_staleness: int | None

    @classmethod
    def read(cls, run: Path) -> PointFigures:
        """Raises ValueError if there is no such run."""
        record = RunRecord.read(run)
        reward = record.first_series("critic/score/mean", "critic/rewards/mean")
        step_s = record.series("timing_s/step")
        num_tokens = record.series("perf/total_num_tokens")
        began = reward.t[0] - step_s.value[0] if len(reward) and len(step_s) else 0.0
        training_s = float(reward.t[-1] - began) if len(reward) else None
        last = reward.value[-max(1, round(len(reward) * FINAL)) :]
        tokens = float(num_tokens.value.sum()) if len(num_tokens) else 0.0
        summary = record.summary
        return cls(
            updates=int(reward.step[-1]) if len(reward) else 0,
            reward=Series(reward.t - began, reward.step, trailing_mean(reward.value)),
            reward_final=float(last.mean()) if len(last) else None,
            accuracy_before=summary.get("accuracy_before"),
            accuracy_after=summary.get("accuracy_after"),
            training_s=training_s,
            tokens_per_s=tokens / training_s if training_s and tokens else None,
            idle=_idle(run, record, began),
            mean_staleness=summary.get("mean_staleness"),
            max_staleness=summary.get("max_staleness"),
        )

    def seconds_to(self, reward: float) -> float | None:
        """Until the smoothed reward first reached it."""
        reached = np.flatnonzero(self.reward.value >= reward)
        return float(self.reward.t[reached[0]]) if len(reached) else None


def _idle(run: Path, record: RunRecord, began: float) -> dict[str, float]:
    log = run / "events.jsonl"
    shares = {
        "rollout": rollout_idle_share(read_events(log)) if log.is_file() else None,
        "train": train_idle_share(record),
    }
    return {stage: share for stage, share in shares.items() if share is not None} | mapped_idle_shares(record, began)


def trailing_mean(values: np.ndarray) -> np.ndarray:
    """Over the last ten values up to each, fewer at the beginning."""
    sums = np.cumsum(np.insert(values.astype(np.float64), 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - TRAILING)
    return (sums[ends] - sums[starts]) / (ends - starts)
