"""What controllers and workers say to each other, and controllers among themselves. Never a row: rows go by the queue.

One encoder and one typed decoder for each direction, made once.
"""

from __future__ import annotations

from typing import Any

import msgspec

FINISHED_TOPIC = "run/finished"
"""Announced by whoever knows that the run has done its work; every node then stops."""


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """All that a worker process is told, as JSON through an inherited file descriptor.

    identity: of this incarnation, on the control socket. parent: process id of the controller. life, restore_from: as
    in ControllerSettings. queue_endpoints: this node's shard first."""

    name: str
    worker: str
    node: int
    num_nodes: int
    rank: int
    world_size: int
    index: int
    threads: int
    devices: tuple[str, ...]
    stages: tuple[str, ...]
    target: str
    payload: dict[str, Any]
    session_dir: str
    run_dir: str
    control_endpoint: str
    identity: str
    parent: int
    life: int = 0
    restore_from: str = ""
    queue_endpoints: tuple[str, ...] = ()
    queue_secret: str = ""
    events_max_bytes: int = 1 << 30


class Hello(msgspec.Struct, frozen=True, tag=True):
    """First word of a worker."""


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The worker has set itself up. `details` is for whoever waits for it (the shard's endpoints)."""

    details: dict[str, Any]


class Heartbeat(msgspec.Struct, frozen=True, tag=True):
    """waiting_for: what the worker waits for, empty if it works; since_s: for how long."""

    waiting_for: str
    since_s: float


class Report(msgspec.Struct, frozen=True, tag=True):
    metrics: dict[str, float]
    step: int | None


class Announcement(msgspec.Struct, frozen=True, tag=True):
    """A fact that all may need to know; the last one of a topic is kept for workers that start later.

    origin: worker. everywhere: on all nodes, not on the origin's alone."""

    topic: str
    payload: dict[str, Any]
    origin: str
    everywhere: bool = True


class Request(msgspec.Struct, frozen=True, tag=True):
    """A worker asks its controller; `number` comes back in the Reply."""

    number: int
    method: str
    argument: dict[str, Any]


class Finished(msgspec.Struct, frozen=True, tag=True):
    """The worker's target has returned."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """reason: the exception in one line. traceback: in full."""

    reason: str
    traceback: str


class Welcome(msgspec.Struct, frozen=True, tag=True):
    """Answers Hello: what has been announced so far."""

    retained: tuple[Announcement, ...]


class Reply(msgspec.Struct, frozen=True, tag=True):
    """`error` says, if it is not empty, why there is no result."""

    number: int
    result: dict[str, Any]
    error: str = ""


class Stop(msgspec.Struct, frozen=True, tag=True):
    """End now, in good order."""


class Goodbye(msgspec.Struct, frozen=True, tag=True):
    """The controller has heard Finished or Failed; the worker may end."""


ToController = Hello | Ready | Heartbeat | Report | Announcement | Request | Finished | Failed
ToWorker = Welcome | Announcement | Reply | Stop | Goodbye

encode = msgspec.msgpack.Encoder().encode
decode_to_controller = msgspec.msgpack.Decoder(ToController).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
