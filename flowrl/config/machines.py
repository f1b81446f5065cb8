"""What a recipe says of pools, stages, the queue, the network and the run."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from flowrl.config.checks import check_at_least, check_dotted, check_one_of, check_positive

PEER_WORD_S = 2
DEVICE = re.compile(r"cpu|[a-z]+:\d+")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """Where workers run. nodes: indices, empty for all. workers: a node. threads: each worker may use. devices: of a
    node, dealt out evenly among its workers: `cuda:0`, or `cpu`, which all may use. Where rollout's and train's pools
    name the same device, its engine and its trainer rank take turns (docs/placement.md); to have that without a GPU,
    name parts of the host, `cpu:0`, `cpu:1`."""

    nodes: list[int] = field(default_factory=list)
    workers: int = 1
    threads: int = 1
    devices: list[str] = field(default_factory=lambda: ["cpu"])

    def __post_init__(self) -> None:
        check_at_least("pools.*.workers", self.workers, 1)
        check_at_least("pools.*.threads", self.threads, 1)
        for device in self.devices:
            if not DEVICE.fullmatch(device):
                raise ValueError(f"pools.*.devices: {device!r}; must read 'cpu', or with a number as 'cuda:0', 'cpu:0'")


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """A stage of yours. run: `file.py:Class` or `package.module:Class` with `process(rows) -> columns`. unit: what one
    call gets: rows, whole groups, or the whole batch of an update, which train has taken and hands over in its own
    process."""

    run: str
    reads: list[str] = field(default_factory=list)
    optional: list[str] = field(default_factory=list)
    writes: list[str] = field(default_factory=list)
    unit: str = "row"
    pool: str = "cpu"
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_one_of("stages.*.unit", self.unit, ("row", "group", "batch"))
        check_dotted("stages.*.run", self.run)


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """byte_limit_mb: of one shard, which keeps its rows in shared memory; a full one makes producers wait. lease_s:
    after which an unacknowledged row is delivered again."""

    byte_limit_mb: int = 1024
    lease_s: float = 10.0

    def __post_init__(self) -> None:
        check_at_least("queue.byte_limit_mb", self.byte_limit_mb, 1)
        check_positive("queue.lease_s", self.lease_s)


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """interface: that nodes reach each other on; `lo` keeps all on one machine. trusted: says that the network is
    closed, without which a run off loopback is refused, because torch RPC has no secret. (The queue has one of its own
    there: node 0 makes it, and the nodes exchange it.) meet_s: for all nodes to find each other at the start; peer_s:
    silence after which a node counts as dead, and the life of the run ends."""

    interface: str = "lo"
    trusted: bool = False
    meet_s: float = 120.0
    peer_s: float = 10.0

    def __post_init__(self) -> None:
        check_positive("network.meet_s", self.meet_s)
        if self.peer_s <= PEER_WORD_S:
            raise ValueError(f"network.peer_s: {self.peer_s}; nodes speak once a second, so more than {PEER_WORD_S}")
        if self.meet_s <= self.peer_s:
            raise ValueError(
                f"network.meet_s: {self.meet_s}; must be above network.peer_s={self.peer_s}, after which the others of "
                "a node that is started again have noticed"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run leaves its files: `dir`/`name`. checkpoint_every: updates, 0 for none but at the end. samples_every:
    groups, two samples of which are written for people to read. events_max_mb: at which a segment of the event log is
    closed; events.jsonl is the newest, events.1.jsonl the oldest. session_dir: a directory on tmpfs for sockets and
    weights, by default one of the user's in /dev/shm. determinism: `strict` gives the same weights bit for bit when a
    recipe is run again, at some cost in speed (docs/determinism.md). record: write what each trainer rank consumes, so
    that `flowrl replay` can retrain the run bit for bit. restarts: how often in a row a run that has failed goes on
    from its newest checkpoint by itself without a newer one coming of it (on several nodes torchrun's --max-restarts
    does that). heartbeat_s: silence after which a worker counts as hung. stall_s: after which one that
    waits for one and the same thing is named, with its stacks in its log. stop_s: what workers get to end in order, the
    trainer's last checkpoint included, before they are ended by signals."""

    name: str
    dir: str = "runs"
    checkpoint_every: int = 50
    checkpoints_kept: int = 2
    samples_every: int = 10
    events_max_mb: int = 1024
    session_dir: str | None = None
    determinism: str = "fast"
    record: bool = True
    restarts: int = 2
    heartbeat_s: float = 60.0
    stall_s: float = 300.0
    stop_s: float = 30.0

    def __post_init__(self) -> None:
        check_one_of("run.determinism", self.determinism, ("fast", "strict"))
        check_at_least("run.checkpoint_every", self.checkpoint_every, 0)
        check_at_least("run.restarts", self.restarts, 0)
        check_at_least("run.heartbeat_s", self.heartbeat_s, 3)
        check_positive("run.stall_s", self.stall_s)
        check_positive("run.stop_s", self.stop_s)
        check_at_least("run.samples_every", self.samples_every, 1)
        check_at_least("run.events_max_mb", self.events_max_mb, 1)
        check_at_least("run.checkpoints_kept", self.checkpoints_kept, 1)
        if not self.name or "/" in self.name:
            raise ValueError(f"run.name: {self.name!r}; must be a directory name")
