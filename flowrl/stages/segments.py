"""Which log-probs of which rows the proximal stage owes, and when a row has all it can get. Pure: no model, no queue.

A token sampled at version v is owed its log-prob under v + 1. One that will be one update old when it trains is not:
the trainer computes that number itself, for it starts from v + 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from flowrl.config.recipe import LEAST_LAG
from flowrl.trainer.packing import Sample
from transfer_queue.rows import RowKey


@dataclass(frozen=True, slots=True)
class HeldRow:
    """version_T: of each response token. value_T: NaN where not computed. done: versions whose tokens are settled."""

    sample: Sample
    version_T: np.ndarray
    value_T: np.ndarray
    done: set[int]

    @classmethod
    def of(cls, sample: Sample, version_T: np.ndarray) -> HeldRow:
        return cls(sample, version_T, np.full(len(version_T), np.nan, np.float32), set())

    @property
    def key(self) -> RowKey:
        return self.sample.key


class Segments:
    """max_staleness: the bound, by which a row is trained or never."""

    def __init__(self, max_staleness: int) -> None:
        self._max_staleness = max_staleness
        self._rows: list[HeldRow] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, rows: Iterable[HeldRow]) -> None:
        self._rows += rows

    def owed(self, newest: int) -> list[tuple[int, list[HeldRow]]]:
        """With `newest` published: [(v, rows that have tokens of v not yet settled), …] for every v below it, oldest
        first. Rows that can no longer be trained are forgotten."""
        self._rows = [row for row in self._rows if newest <= int(row.version_T.min()) + self._max_staleness]
        found: dict[int, list[HeldRow]] = {}
        for row in self._rows:
            for version in np.unique(row.version_T).tolist():
                if version < newest and version not in row.done:
                    found.setdefault(version, []).append(row)
        return sorted(found.items())

    def settle(self, version: int, rows: Sequence[HeldRow], logprobs: Sequence[np.ndarray] | None) -> None:
        """Fills in what version + 1 says of the tokens of `version`; None if those weights are gone."""
        for place, row in enumerate(rows):
            row.done.add(version)
            if logprobs is not None:
                is_ours_T = row.version_T == version
                row.value_T[is_ours_T] = logprobs[place][is_ours_T]

    def finished(self) -> list[HeldRow]:
        """Takes out the rows that have all that an update could still want of them."""
        complete = [row for row in self._rows if self._is_complete(row)]
        if complete:
            gone = {id(row) for row in complete}
            self._rows = [row for row in self._rows if id(row) not in gone]
        return complete

    def _is_complete(self, row: HeldRow) -> bool:
        last_update = int(row.version_T.min()) + self._max_staleness
        return all(
            version in row.done for version in np.unique(row.version_T).tolist() if last_update - version >= LEAST_LAG
        )
