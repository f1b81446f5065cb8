"""What is simulated."""

from __future__ import annotations

from dataclasses import dataclass, field

from flowrl.simulate.durations import Durations, LogNormal
from transfer_queue.policies import late_policy, order_policy


@dataclass(frozen=True, kw_only=True)
class Setting:
    """batch_groups groups of group_size rows make an update; each of the engines works on up to `concurrency` groups at
    once, all rows of a group starting together, each taking what `durations` says. An engine names itself to shard
    (its number mod shards).

    surplus_groups: that may be outstanding beyond those that updates have room for (`rollout.oversampling`).
    max_staleness: None for a run that nothing bounds. late, order: of the training consumer, as in `QueueConfig` and
    `ConsumerSpec`. clock_s: one way between a shard and the accounts; 0 puts them into one process.
    row_train_s, step_s: the trainer is busy for this long with each row, and at the end of an update. It begins with
    micro_batch_rows of an update as soon as it has so many, and with what is left over when it has them all.
    publish_s: from then until engines may load; load_s: a loading engine makes no tokens (what runs is kept);
    engine_lag_s: mean of an exponential delay, drawn for each engine and version, until it notices.
    filtered: share of groups that are dropped when they are complete (tied), half of them before they are ready for
    training and half after. failures: share of groups with whose start their engine dies; it is back after restart_s.
    """

    batch_groups: int
    group_size: int = 1
    max_staleness: int | None = 2
    surplus_groups: int = 0
    late: str = "wait"
    order: str = "deadline"
    max_attempts: int = 3
    engines: int = 1
    concurrency: int = 16
    shards: int = 1
    clock_s: float = 0.0
    durations: Durations = field(default_factory=lambda: LogNormal(1.0, 1.0))
    row_train_s: float = 0.0
    micro_batch_rows: int = 1
    step_s: float = 0.0
    publish_s: float = 0.0
    load_s: float = 0.0
    engine_lag_s: float = 0.0
    filtered: float = 0.0
    failures: float = 0.0
    restart_s: float = 1.0
    updates: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("batch_groups", "group_size", "max_attempts", "engines", "concurrency", "shards", "micro_batch_rows")
        for name in (*counts, "updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; must be at least 1")
        for name in ("clock_s", "row_train_s", "step_s", "publish_s", "load_s", "engine_lag_s", "restart_s"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; must not be negative")
        if self.surplus_groups < 0:
            raise ValueError(f"surplus_groups: {self.surplus_groups}; must not be negative")
        for name in ("filtered", "failures"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; must be from 0 to below 1")
        if self.max_staleness is not None and self.max_staleness < 0:
            raise ValueError(f"max_staleness: {self.max_staleness}; must not be negative")
        if self.engines < self.shards:
            raise ValueError(
                f"engines: {self.engines}; must be at least one a shard, and there are {self.shards} shards"
            )
        late_policy(self.late)
        order_policy(self.order)

    @property
    def batch_rows(self) -> int:
        return self.batch_groups * self.group_size

    @property
    def surplus_rows(self) -> int:
        return self.surplus_groups * self.group_size
