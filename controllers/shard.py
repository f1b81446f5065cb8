"""The worker that hosts a node's shard of the queue: wires it to the clock, the event log and the controller.

What a shard does is `transfer_queue`'s; what the application asks of it is in its QueueConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from controllers.context import WorkerContext
from controllers.graph import Graph
from controllers.placement import HOST_DEVICE, WorkerPlan
from controllers.settings import QueueSettings, WorkerSettings
from controllers.stage import Stage, Unit
from controllers.topology import Topology
from transfer_queue.clock import RemoteClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.rows import RowKey
from transfer_queue.server import QueueServer

SHARD_WORKER = "queue"
QUEUE_DIR = "queue"
"""In a checkpoint: the queue as all shards have saved it."""


def shard_plan(topology: Topology) -> WorkerPlan:
    return WorkerPlan(
        name=f"{SHARD_WORKER}.{topology.node}.0",
        worker=SHARD_WORKER,
        node=topology.node,
        index=0,
        rank=topology.node,
        world_size=topology.num_nodes,
        stages=(),
        pool="",
        threads=1,
        devices=(HOST_DEVICE,),
    )


def shard_settings(
    graph: Graph, queue: QueueSettings, endpoint: str, clock_endpoint: str, topology: Topology
) -> WorkerSettings:
    """A shard's rows are in its memory alone: without it the run cannot go on, so it is never restarted."""
    config = {
        "endpoint": endpoint,
        "consumers": {name: consumer_of(stage) for name, stage in graph.consumers().items()},
        "first_group": topology.node,
        "group_stride": topology.num_nodes,
        "byte_limit": queue.byte_limit,
        "lease_s": queue.lease_s,
        "late": queue.late,
        "max_attempts": queue.max_attempts,
    }
    payload = {"config": msgspec.to_builtins(config), "clock_endpoint": clock_endpoint}
    return WorkerSettings(target="controllers.shard:main", payload=payload, restart="never")


def consumer_of(stage: Stage) -> ConsumerSpec:
    """Every stage that reads is a consumer by its own name. One that takes batches takes them against the clock."""
    return ConsumerSpec(
        columns=stage.reads,
        optional=stage.optional,
        partition=stage.partition,
        unit="row" if stage.unit is Unit.ROW else "group",
        training=stage.unit is Unit.BATCH,
    )


def main(context: WorkerContext) -> None:
    given = {
        "secret": context.queue_secret,
        "segment_dir": str(context.session_dir / "segments"),
        "life": context.life,
        "save_dir": str(context.run_dir),
        "restore_dir": str(context.restore_from / QUEUE_DIR) if context.restore_from is not None else "",
    }
    config = msgspec.convert({**context.payload["config"], **given}, QueueConfig)
    with context.event_log() as log:

        def write(kind: str, key: RowKey, fields: Mapping[str, Any]) -> None:
            log.write(kind, key, **fields)
            if kind == "taken":  # in the file before the trainer hears of it, should this process be killed
                log.flush()

        server = QueueServer(config, RemoteClock(context.payload["clock_endpoint"], context.name), write)
        context.on_stop(server.stop)
        context.ready(endpoint=server.endpoint)
        server.serve()
        server.close()
