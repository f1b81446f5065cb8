"""What is noted while a simulation runs, and what it comes to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from transfer_queue.rows import RowKey


@dataclass
class Record:
    """begun_s: response-seconds of all that engines began; trained_s: of what came to be trained. idle_s: the trainer
    waited for rows."""

    begun_s: float = 0.0
    trained_s: float = 0.0
    idle_s: float = 0.0
    failures: int = 0
    update_ends: list[float] = field(default_factory=list)
    lags: Counter[int] = field(default_factory=Counter)
    _seconds: dict[RowKey, float] = field(default_factory=dict)
    _seen: set[tuple[int, int]] = field(default_factory=set)

    def begun(self, key: RowKey, seconds: float) -> None:
        self._seconds[key] = seconds
        self.begun_s += seconds

    def trained(self, key: RowKey, lag: int) -> None:
        """A prompt's sample is trained once, whatever its attempt."""
        name = (key.group, key.index)
        assert name not in self._seen, f"{key} was trained twice"
        assert lag >= 0, f"{key} is of a later policy"
        self._seen.add(name)
        self.trained_s += self._seconds.pop(key)
        self.lags[lag] += 1


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """seconds: virtual time to the end of the last update. rows_s: trained a second, over the second half of the
    updates, when the pipeline is full. trainer_idle: share of the time that the trainer waited for rows. untrained:
    share of the engines' work whose rows were not trained by the end, those still under way among them. ended: rows
    that left untrained, by reason. clock_messages: an update, between the accounts and shards at a
    distance, over that half too."""

    seconds: float
    rows_s: float
    trainer_idle: float
    untrained: float
    max_lag: int
    mean_lag: float
    ended: Mapping[str, int]
    failures: int
    updates: int
    clock_messages: float = 0.0
