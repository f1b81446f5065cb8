"""The filter of tied groups: a prompt whose samples are all rewarded alike is dropped, and another takes its place.

Its advantages would be zero, and its tokens would only fill the update (dynamic sampling: Yu et al. 2025, DAPO, section
3.2). What is kept is not made anew: it waits, as all rows do, until its deadline.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from controllers.context import WorkerContext
from transfer_queue.client import QueueClient
from transfer_queue.rows import Column, RowKey, Rows

MOST_TIED_IN_A_ROW = 4096


class TiedGroups:
    """Reads rewards of whole groups, writes `is_untied`, for which the stages after it wait."""

    def __init__(self, context: WorkerContext, settings: Mapping[str, Any]) -> None:
        self.context = context
        self.queue: QueueClient | None = None
        self.num_groups = self.num_tied = self.num_in_a_row = 0

    def process(self, rows: Rows) -> dict[str, Column]:
        tied = tied_groups(rows.keys, rows["reward"].values)
        if tied:
            if self.queue is None:  # made by the thread that uses it
                self.queue = QueueClient(self.context.queue_endpoints, secret=self.context.queue_secret)
            self.queue.drop([keys[0] for keys in tied], "tied")
        num_groups = len({(key.partition, key.group, key.attempt) for key in rows.keys})
        self._count(num_groups, len(tied))
        return {"is_untied": Column.scalars([1] * len(rows), "uint8")}  # the queue ignores it for what was dropped

    def close(self) -> None:
        if self.queue is not None:
            self.queue.close()

    def _count(self, num_groups: int, num_tied: int) -> None:
        self.num_groups += num_groups
        self.num_tied += num_tied
        self.num_in_a_row = self.num_in_a_row + num_tied if num_tied == num_groups else 0
        self.context.report({"rollout/tied_groups": self.num_tied / self.num_groups})
        if self.num_in_a_row >= MOST_TIED_IN_A_ROW:
            raise RuntimeError(
                f"rollout.filter_tied: the rewards of {self.num_in_a_row} groups in a row were all equal; nothing is "
                "left to learn from, or the reward is always the same"
            )


def tied_groups(keys: Sequence[RowKey], rewards: np.ndarray) -> list[list[RowKey]]:
    """The keys of each group whose rewards are all equal."""
    members: dict[tuple[str, int, int], list[int]] = {}
    for row, key in enumerate(keys):
        members.setdefault((key.partition, key.group, key.attempt), []).append(row)
    return [[keys[row] for row in places] for places in members.values() if np.ptp(rewards[places]) == 0]
