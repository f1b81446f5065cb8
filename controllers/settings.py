"""What the application tells a node's controller beside graph and placement. Validated here, used elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

import msgspec

from controllers.graph import Graph
from controllers.lifecycle import default_root
from controllers.messages import Heartbeat
from controllers.placement import WorkerPlan
from controllers.stage import Kind
from controllers.supervisor import Limits, WorkerState

EXECUTOR_TARGET = "controllers.executor:run_stages"


class WorkerSettings(TypedDict, total=False):
    """target: 'package.module:name', called with the WorkerContext. restart: what happens when it dies; with "never"
    the run fails. most: of this kind on a node, if workers may join and leave while the run goes on (`wanted.py`). What
    is left out follows from the worker's stages: a driver is run as its stage declares it, with the stage's settings
    and the `stages` that it hosts as payload, and never restarted; mapped stages are run by the executor and
    restarted."""

    target: str
    payload: dict[str, Any]
    restart: Literal["always", "never"]
    most: int


@dataclass(frozen=True, kw_only=True)
class QueueSettings:
    """batch_rows: of an update; max_staleness: in versions; surplus_rows: as in transfer_queue.staleness. version,
    incarnation: where the clock starts. is_restored: shards begin with the rows of a checkpoint, and nothing is
    admitted before all of them have. byte_limit, on each shard; lease_s, late, max_attempts: as in
    transfer_queue.config.QueueConfig."""

    batch_rows: int
    max_staleness: int
    surplus_rows: int = 0
    version: int = 0
    incarnation: int = 0
    is_restored: bool = False
    byte_limit: int = 4 << 30
    lease_s: float = 120.0
    late: str = "wait"
    max_attempts: int = 3


@dataclass(frozen=True, kw_only=True)
class ControllerSettings:
    """run_dir: must exist. life: how often the run has been started before; restore_from: the checkpoint to go on from,
    a path below run_dir, empty to begin anew (node 0's count for all nodes). queue: None starts no shard. session_root:
    where session directories are made; needed_bytes: free space wanted there. address, interface: of this node, where
    others reach it. is_trusted: says that only the run's own nodes can reach these; several nodes off loopback need it,
    because torch RPC has no secret. recipe: a hash that must agree on all nodes; versions: by name, what else must.
    events_max_bytes: at which a segment of the event log is closed. preload: modules of targets, slow to import;
    workers of them, unless on a GPU, are forked from a process that has done so (`nursery.py`). start_s: for the nodes
    to find each other; peer_s: silence that makes a node dead."""

    run_dir: Path
    queue: QueueSettings | None = None
    life: int = 0
    restore_from: str = ""
    session_root: Path = field(default_factory=default_root)
    needed_bytes: int = 0
    address: str = "127.0.0.1"
    interface: str = "lo"
    is_trusted: bool = False
    recipe: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    limits: Limits = field(default_factory=Limits)
    events_max_bytes: int = 1 << 30
    preload: tuple[str, ...] = ()
    start_s: float = 120.0
    peer_s: float = 10.0

    def __post_init__(self) -> None:
        if not self.run_dir.is_dir():
            raise ValueError(f"run.dir: {self.run_dir}; must be an existing directory")
        if self.peer_s <= 2:
            raise ValueError(f"peer_s: {self.peer_s}; nodes speak once a second, so more than 2")


@dataclass(frozen=True, kw_only=True)
class Observers:
    """Called in the controller's loop, so they must be brief. on_worker hears of this node's workers, on_announcement
    what they are told, on_heartbeat what they wait for, on_stall who has done so for too long; on_report hears this
    node's workers, and on node 0 those of all nodes. on_end(exit code, reason) is the last word."""

    on_report: Callable[[str, dict[str, float], int | None], None] = lambda worker, metrics, step: None
    on_worker: Callable[[str, WorkerState, str], None] = lambda worker, state, text: None
    on_announcement: Callable[[str, dict[str, Any]], None] = lambda topic, payload: None
    on_heartbeat: Callable[[str, Heartbeat], None] = lambda worker, heartbeat: None
    on_stall: Callable[[str, str], None] = lambda worker, text: None
    on_end: Callable[[int, str], None] = lambda code, reason: None


def worker_settings_of(plan: WorkerPlan, graph: Graph, given: Mapping[str, WorkerSettings]) -> WorkerSettings:
    """Complete. An entry for the worker's own name goes before one for its kind."""
    stages = [graph.stage(name) for name in plan.stages]
    first = stages[0]
    payload: dict[str, Any] = {"stages": [msgspec.to_builtins(stage) for stage in stages if stage.kind is Kind.MAPPED]}
    if first.kind is Kind.DRIVER:
        default = WorkerSettings(target=first.run, payload={**payload, **first.settings}, restart="never")
    else:
        default = WorkerSettings(target=EXECUTOR_TARGET, payload=payload, restart="always")
    settings = given.get(plan.name, given.get(plan.worker, WorkerSettings()))
    if sum(stage.kind is Kind.DRIVER for stage in stages) > 1 and "target" not in settings:
        raise ValueError(f"worker_settings.{plan.worker}.target: none, and several drivers share the process")
    return WorkerSettings(**{**default, **settings})


def refuse_unknown_workers(plans: Sequence[WorkerPlan], given: Mapping[str, WorkerSettings]) -> None:
    known = {plan.name for plan in plans} | {plan.worker for plan in plans}
    for name, settings in given.items():
        if name not in known:
            kinds = sorted({plan.worker for plan in plans})
            raise ValueError(f"worker_settings: {name!r} is no worker; the kinds are {kinds}")
        if "target" in settings and ":" not in settings["target"]:
            raise ValueError(f"worker_settings.{name}.target: {settings['target']!r}; reads 'package.module:name'")
        if settings.get("restart", "never") not in ("always", "never"):
            raise ValueError(f"worker_settings.{name}.restart: {settings['restart']!r}; must be 'always' or 'never'")
