"""What a shard is told at its start: who consumes which columns, its group numbers, its limits, its address."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from transfer_queue.cursor import Cursor
from transfer_queue.policies import late_policy, order_policy
from transfer_queue.security import check_endpoint

MAX_COLUMNS = 64
HIGH_WATER_MARK = 1000
"""Messages that wait in a socket, either way; a peer that lets more of them wait counts as gone."""


@dataclass(frozen=True)
class ConsumerSpec:
    """A row is ready for the consumer when all `columns` are there. `optional` ones are delivered if any row of the
    batch has them (rows without have length 0) and never waited for. unit "group" takes whole groups only. A `training`
    consumer always takes whole groups: an update is made of them. order: what is ready is taken by "deadline" (the
    stalest first), "freshest" first, by "arrival", or as a function says, `package.module:function` (see
    `policies.py`). The staleness bound holds in any order."""

    columns: tuple[str, ...]
    optional: tuple[str, ...] = ()
    partition: str = "train"
    unit: Literal["row", "group"] = "row"
    training: bool = False
    order: str = "deadline"

    def __post_init__(self) -> None:
        object.__setattr__(self, "columns", tuple(self.columns))
        object.__setattr__(self, "optional", tuple(self.optional))
        if self.unit not in ("row", "group"):
            raise ValueError(f"unit: {self.unit!r}; must be 'row' or 'group'")
        if not self.columns:
            raise ValueError("columns: empty; a consumer reads at least one")
        both = set(self.columns) & set(self.optional)
        if both:
            raise ValueError(f"optional: {sorted(both)} are among columns too; a column is waited for or it is not")
        order_policy(self.order)

    @property
    def takes_groups(self) -> bool:
        return self.training or self.unit == "group"


@dataclass(frozen=True, kw_only=True)
class QueueConfig:
    """endpoint: ipc://path or tcp://host:port ("*" lets the system choose the port). secret: shared by all who may
    speak with this shard; needed off loopback. consumers: all there will ever be, because a row is kept until every
    one that reads its partition is done with it. A shard's groups are first_group + k·group_stride; the stride is the
    number of shards. late: "wait" refuses a training take that unready rows stand in the way of, "drop" drops those,
    and a function of the user's, `package.module:function`, says which of them to drop (see `policies.py`);
    `max_attempts` bounds how often a group is tried. lease_s: after that a taken row is given to somebody else.
    life: how often this queue has been started before; cursors: by partition, what it left open then.
    segment_dir: where rows lie, on tmpfs unless you say otherwise ("": a directory of yours in /dev/shm); it must have
    room for byte_limit. What a dead shard has left there goes when the next one starts. durable_dir: where rows lie
    instead, with a journal, so that a shard that is killed and started again goes on where it was; one directory a
    shard. save_dir: below which clients may have the shard save its rows ("": nowhere). restore_dir: of a saved queue
    to go on from (`QueueClient.save`)."""

    endpoint: str
    consumers: Mapping[str, ConsumerSpec]
    first_group: int = 0
    group_stride: int = 1
    byte_limit: int = 4 << 30
    max_message_bytes: int = 1 << 30
    lease_s: float = 600.0
    late: str = "wait"
    max_attempts: int = 3
    life: int = 0
    cursors: Mapping[str, Cursor] = field(default_factory=dict)
    secret: str = ""
    segment_dir: str = ""
    durable_dir: str = ""
    save_dir: str = ""
    restore_dir: str = ""

    def __post_init__(self) -> None:
        if self.first_group < 0:
            raise ValueError(f"first_group: {self.first_group}; must not be negative")
        for name in ("group_stride", "byte_limit", "max_message_bytes", "max_attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; must be at least 1")
        if self.lease_s <= 0:
            raise ValueError(f"lease_s: {self.lease_s}; must be positive")
        late_policy(self.late)
        self._check_consumers()
        check_endpoint(self.endpoint, self.secret)

    def _check_consumers(self) -> None:
        if not self.consumers:
            raise ValueError("consumers: empty; nobody would ever free a row")
        names = {column for spec in self.consumers.values() for column in (*spec.columns, *spec.optional)}
        if len(names) > MAX_COLUMNS:
            raise ValueError(f"consumers: read {len(names)} columns; at most {MAX_COLUMNS}")
        training = [name for name, spec in self.consumers.items() if spec.training]
        if len(training) > 1:
            raise ValueError(f"consumers: {training} are all training; one clock counts one consumer's updates")
