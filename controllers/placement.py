"""Which worker runs where. Pure: every controller computes the same plan from the same recipe, and compares its hash.

A pool is a set of nodes with so many worker processes on each. A worker of a kind ("rollout") is named
`kind.node.index`; ranks count over nodes and then over workers. Workers of two kinds that share devices of a node have
to take turns; "cpu" is everybody's and never shared in this sense, but its parts "cpu:0", "cpu:1", … are.
"""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from controllers.graph import Graph
from controllers.stage import Stage

HOST_DEVICE = "cpu"


@dataclass(frozen=True, kw_only=True)
class Pool:
    """nodes: empty means all. workers: processes on each node, for each kind of worker in the pool. threads: of each
    process. devices: of a node, dealt out evenly and never shared within a kind, except for "cpu"."""

    name: str
    nodes: tuple[int, ...] = ()
    workers: int = 1
    threads: int = 1
    devices: tuple[str, ...] = (HOST_DEVICE,)

    def __post_init__(self) -> None:
        if self.workers < 1:
            raise ValueError(f"pools.{self.name}.workers: {self.workers}; must be at least 1")
        if self.threads < 1:
            raise ValueError(f"pools.{self.name}.threads: {self.threads}; must be at least 1")
        if len(set(self.nodes)) != len(self.nodes):
            raise ValueError(f"pools.{self.name}.nodes: {list(self.nodes)}; names a node twice")
        if not self.devices:
            raise ValueError(f"pools.{self.name}.devices: empty; name at least {HOST_DEVICE!r}")
        if len(set(self.devices)) != len(self.devices):
            raise ValueError(f"pools.{self.name}.devices: {list(self.devices)}; names a device twice")


class WorkerPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One process. rank, world_size: among the workers of its kind on all nodes. index: among those of its node."""

    name: str
    worker: str
    node: int
    index: int
    rank: int
    world_size: int
    stages: tuple[str, ...]
    pool: str
    threads: int
    devices: tuple[str, ...]


def plan(graph: Graph, pools: Sequence[Pool], num_nodes: int) -> tuple[WorkerPlan, ...]:
    """All workers of all nodes, in topological order. Raises ValueError, naming stage, pool and rule."""
    by_name = {pool.name: pool for pool in pools}
    if len(by_name) != len(pools):
        raise ValueError(f"pools: {[pool.name for pool in pools]}; a pool's name must be unique")
    plans: list[WorkerPlan] = []
    for worker, stages in graph.workers().items():
        pool = by_name.get(stages[0].pool)
        if pool is None:
            raise ValueError(f"stages.{stages[0].name}.pool: {stages[0].pool!r}; the pools are {sorted(by_name)}")
        plans += _workers(worker, stages, pool, _nodes(stages[0], pool, num_nodes))
    return tuple(plans)


class Placement(enum.Enum):
    """Of two kinds of worker: all of their devices are the same ones, none is, or some are."""

    COLOCATED = "colocated"
    SPLIT = "split"
    HYBRID = "hybrid"


def placement(plans: Sequence[WorkerPlan], one: str, other: str) -> Placement:
    devices = [
        {(plan.node, device) for plan in plans if plan.worker == kind for device in plan.devices}
        for kind in (one, other)
    ]
    if not any(device != HOST_DEVICE for _, device in devices[0] & devices[1]):
        return Placement.SPLIT
    return Placement.COLOCATED if devices[0] == devices[1] else Placement.HYBRID


def sharing(plans: Sequence[WorkerPlan], one: str, other: str) -> dict[str, tuple[str, ...]]:
    """Worker of one of the two kinds -> workers of the other with a device in common; those that share none are left
    out."""
    found: dict[str, tuple[str, ...]] = {}
    for kind, others in ((one, other), (other, one)):
        for plan in plans:
            if plan.worker == kind:
                sharers = tuple(their.name for their in plans if their.worker == others and shared_devices(plan, their))
                if sharers:
                    found[plan.name] = sharers
    return found


def shared_devices(plan: WorkerPlan, other: WorkerPlan) -> list[str]:
    """That both would use."""
    if plan.node != other.node:
        return []
    return sorted(set(plan.devices) & set(other.devices) - {HOST_DEVICE})


def backing_device(device: str) -> str:
    """As libraries know it: all parts of the host are the host."""
    return HOST_DEVICE if device.partition(":")[0] == HOST_DEVICE else device


def joined(plans: Sequence[WorkerPlan], kind: str, node: int, index: int) -> WorkerPlan:
    """One that was not planned: like the first of its kind on the node, with a rank after all that were."""
    first = next(plan for plan in plans if (plan.worker, plan.node, plan.index) == (kind, node, 0))
    return msgspec.structs.replace(first, name=f"{kind}.{node}.{index}", index=index, rank=first.world_size + index)


def fingerprint(plans: Sequence[WorkerPlan]) -> str:
    """Equal on all nodes, or the run is refused."""
    return hashlib.sha256(msgspec.json.encode(list(plans))).hexdigest()[:16]


def _nodes(stage: Stage, pool: Pool, num_nodes: int) -> tuple[int, ...]:
    for node in pool.nodes:
        if not 0 <= node < num_nodes:
            raise ValueError(
                f"pools.{pool.name}.nodes: {node}; stage {stage.name!r} needs this pool, and the run has nodes 0 to "
                f"{num_nodes - 1}"
            )
    return tuple(sorted(pool.nodes)) or tuple(range(num_nodes))


def _workers(worker: str, stages: Sequence[Stage], pool: Pool, nodes: Sequence[int]) -> list[WorkerPlan]:
    devices = _devices(stages[0], pool)
    return [
        WorkerPlan(
            name=f"{worker}.{node}.{index}",
            worker=worker,
            node=node,
            index=index,
            rank=place * pool.workers + index,
            world_size=len(nodes) * pool.workers,
            stages=tuple(stage.name for stage in stages),
            pool=pool.name,
            threads=pool.threads,
            devices=devices[index],
        )
        for place, node in enumerate(nodes)
        for index in range(pool.workers)
    ]


def _devices(stage: Stage, pool: Pool) -> list[tuple[str, ...]]:
    """The devices of each worker of a node."""
    if pool.devices == (HOST_DEVICE,):
        return [pool.devices] * pool.workers
    each, left_over = divmod(len(pool.devices), pool.workers)
    if each == 0:
        raise ValueError(
            f"pools.{pool.name}.devices: {list(pool.devices)}; stage {stage.name!r} has {pool.workers} workers on a "
            f"node, and each needs a device of its own"
        )
    if left_over:
        raise ValueError(
            f"pools.{pool.name}.devices: {len(pool.devices)} devices do not divide evenly among the {pool.workers} "
            f"workers of stage {stage.name!r}"
        )
    return [pool.devices[index * each : (index + 1) * each] for index in range(pool.workers)]
