"""What a worker's code gets: who it is, where things are, and how it speaks with the rest of the run.

The surface that executors and drivers program against; the channel behind it is `control.py`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from controllers.control import Callback, ControlChannel
from controllers.eventlog import EventLog
from controllers.messages import Announcement, Ready, Report, WorkerSpec
from controllers.placement import backing_device

_RENDEZVOUS_TIMEOUT_S = 60.0


class WorkerContext:
    """name: of this process, `worker.node.index`. rank, world_size: among the processes of its kind. payload: given by
    the application. session_dir: the node's directory on tmpfs. life: which of the run's lives this is, 0 the first;
    restore_from: the checkpoint that it goes on from, None if it begins anew. queue_endpoints: this node's shard first.
    stopping: set when the worker is to end; every loop looks at it."""

    def __init__(self, spec: WorkerSpec, control: ControlChannel) -> None:
        self.name = spec.name
        self.worker = spec.worker
        self.node = spec.node
        self.num_nodes = spec.num_nodes
        self.rank = spec.rank
        self.world_size = spec.world_size
        self.index = spec.index
        self.threads = spec.threads
        self.devices = spec.devices
        self.stages = spec.stages
        self.payload = spec.payload
        self.session_dir = Path(spec.session_dir)
        self.run_dir = Path(spec.run_dir)
        self.life = spec.life
        self.restore_from = self.run_dir / spec.restore_from if spec.restore_from else None
        self.queue_endpoints = list(spec.queue_endpoints)
        self.queue_secret = spec.queue_secret
        self.stopping = control.stopping
        self._events_max_bytes = spec.events_max_bytes
        self._control = control

    @property
    def device(self) -> str:
        """The first of them, as libraries know it."""
        return backing_device(self.devices[0])

    def announce(self, topic: str, payload: dict[str, Any], everywhere: bool = True) -> None:
        """Tells every worker of all nodes, this one too, or of this node alone. Workers that start later hear the last
        announcement of each topic."""
        self._control.send(Announcement(topic, payload, self.name, everywhere))

    def on(self, topic: str, callback: Callback) -> None:
        """Calls `callback(payload)` in the control thread, for the retained announcement and for each to come. It must
        be brief: heartbeats wait for it."""
        self._control.on(topic, callback)

    def on_stop(self, callback: Callable[[], None]) -> None:
        """Calls `callback()` in the control thread when `stopping` is set, for loops that cannot wait on an event."""
        self._control.on_stop(callback)

    async def stopped(self) -> None:
        """Until `stopping` is set, in an asyncio loop. No thread waits for it: a loop that an error ends does not end
        before its threads have, and they would wait for a stop that nobody has reason to send."""
        loop = asyncio.get_running_loop()
        event = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # the loop has been closed
                loop.call_soon_threadsafe(event.set)

        self.on_stop(wake)
        await event.wait()

    def ready(self, **details: Any) -> None:
        """Says that setting up is over. Call it once."""
        self._control.send(Ready(details))

    def report(self, metrics: dict[str, float], step: int | None = None) -> None:
        self._control.send(Report(metrics, step))

    def waiting_for(self, what: str) -> AbstractContextManager[None]:
        """Heartbeats carry `what` while the block lasts, so that whoever gives up on this worker can say why."""
        return self._control.waiting_for(what)

    def event_log(self) -> EventLog:
        """The run's; to be closed by whoever asks."""
        return EventLog(self.run_dir / "events.jsonl", self.node, self._events_max_bytes)

    def rendezvous(self, name: str) -> tuple[str, int]:
        """Host and port where rank 0 of this worker's kind can listen: the same for all who ask by this name.

        A world that is built anew needs a new name. Raises TimeoutError after a minute without an answer."""
        argument = {"name": name, "worker": self.worker}
        result = self._control.ask("rendezvous", argument, _RENDEZVOUS_TIMEOUT_S)
        return result["host"], result["port"]

    def log(self, text: str) -> None:
        """A line in this worker's log file."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
