"""What a batch was like: scores, lengths, staleness, time. Measured from the rows that were consumed.

The largest staleness is counted here from the tokens' own versions, by code that has no part in enforcing the bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowrl.trainer.totals import Totals, spreads
from flowrl.trainer.world import World
from transfer_queue.rows import Column, Rows

ADVANTAGES = "critic/advantages"
STALENESS = "training/off_policy/trajectory_staleness"
FINISHED_BY_LENGTH = 1


class BatchMetrics:
    """add and waited during an update, reduce at its end; staleness over all updates."""

    def __init__(self, group_size: int, *, has_advantage: bool = True) -> None:
        """has_advantage: the rows bring theirs; otherwise the trainer computes and reports them."""
        self._group_size = group_size
        self._measured = MEASURED if has_advantage else tuple(name for name in MEASURED if name != ADVANTAGES)
        self._totals = self._fresh()
        self._max_staleness = 0
        self._sum_staleness = 0.0
        self._num_rows = 0.0

    def add(self, rows: Rows, update: int) -> None:
        """`rows`: whole groups, in the order of their keys' groups or any other."""
        versions = rows["token_versions"]
        oldest_B = np.minimum.reduceat(versions.values, versions.offsets[:-1])
        newest_B = np.maximum.reduceat(versions.values, versions.offsets[:-1])
        measured = {
            "critic/score": rows["reward"].values,
            "response_length": rows["response_tokens"].lengths,
            "prompt_length": rows["prompt_tokens"].lengths,
            STALENESS: update - oldest_B,
            "training/off_policy/trajectory_spans": newest_B - oldest_B + 1,
        }
        if ADVANTAGES in self._measured:
            measured[ADVANTAGES] = rows["advantage"].values
        for name, value_B in measured.items():
            self._totals.measure(name, value_B)
        self._totals.add("rows", float(len(rows)))
        self._totals.add("clipped", float(np.count_nonzero(rows["finish_reason"].values == FINISHED_BY_LENGTH)))
        self._totals.add("tied_groups", float(_tied_groups(rows)))
        self._totals.add("tokens", float(_num_tokens(rows["prompt_tokens"]) + _num_tokens(rows["response_tokens"])))

    def waited(self, seconds: float) -> None:
        self._totals.add("waited_s", seconds)

    def reduce(self, world: World, step_s: float) -> dict[str, float]:
        """On every rank. Starts the next update's measures."""
        totals = self._totals.reduce(world)
        self._totals = self._fresh()
        num_rows = max(1.0, totals["rows"])
        self._sum_staleness += totals[f"{STALENESS}/sum"]
        self._num_rows += totals["rows"]
        found = spreads(totals)
        self._max_staleness = max(self._max_staleness, int(found[f"{STALENESS}/max"]))
        wait_s = totals["waited_s"] / world.size
        return found | {
            "response_length/clip_ratio": totals["clipped"] / num_rows,
            "frac_reward_zero_std": totals["tied_groups"] * self._group_size / num_rows,
            "perf/total_num_tokens": totals["tokens"],
            "perf/throughput": totals["tokens"] / step_s / world.size,
            "timing_s/step": step_s,
            "timing_s/wait_for_rows": wait_s,
            "timing_s/update_actor": max(0.0, step_s - wait_s),
        }

    def staleness(self) -> dict[str, float]:
        """Over all updates so far, all ranks."""
        return {
            "max_staleness": self._max_staleness,
            "mean_staleness": round(self._sum_staleness / max(1.0, self._num_rows), 4),
        }

    def state(self) -> list[float]:
        """What `staleness` tells from, to go on from a checkpoint."""
        return [self._max_staleness, self._sum_staleness, self._num_rows]

    def restore(self, state: Sequence[float]) -> None:
        self._max_staleness, self._sum_staleness, self._num_rows = int(state[0]), state[1], state[2]

    def _fresh(self) -> Totals:
        """With every name there, because ranks that saw no row must reduce the same ones."""
        totals = Totals()
        for name in self._measured:
            totals.measure(name, np.empty(0))
        for name in ("rows", "clipped", "tied_groups", "tokens", "waited_s"):
            totals.add(name, 0.0)
        return totals


MEASURED = (
    "critic/score",
    ADVANTAGES,
    "response_length",
    "prompt_length",
    STALENESS,
    "training/off_policy/trajectory_spans",
)


def _num_tokens(column: Column) -> int:
    return len(column.values)


def _tied_groups(rows: Rows) -> int:
    """Groups whose rewards are all alike."""
    reward_by_group: dict[int, set[float]] = {}
    for key, reward in zip(rows.keys, rows["reward"].values.tolist(), strict=True):
        reward_by_group.setdefault(key.group, set()).add(reward)
    return sum(len(rewards) == 1 for rewards in reward_by_group.values())
