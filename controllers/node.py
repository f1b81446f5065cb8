"""The controller of a node: starts its workers, hears them, passes on what they announce, and ends with them.

Reads from top to bottom as a run goes: open, start the queue's shard, start the workers, loop, stop, say farewell
to the other nodes. It decides nothing about the work; a worker announces when that is done. Keeping processes alive is
`supervisor.py`'s, the clock `clock.py`'s, the other nodes `peers.py`'s.
"""

from __future__ import annotations

import enum
import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import FrameType
from typing import Any

import zmq

from controllers import stacks
from controllers.clock import ClockService
from controllers.crew import Crew
from controllers.graph import Graph
from controllers.lifecycle import Session
from controllers.links import Links, NodeEnd
from controllers.mailbox import Mailbox
from controllers.messages import (
    FINISHED_TOPIC,
    Announcement,
    Failed,
    Finished,
    Goodbye,
    Heartbeat,
    Hello,
    Ready,
    Reply,
    Report,
    Request,
    Stop,
    ToController,
    ToWorker,
    Welcome,
    WorkerSpec,
    decode_to_controller,
    encode,
)
from controllers.nursery import Nursery
from controllers.placement import WorkerPlan
from controllers.process import environment
from controllers.reaper import Reaper
from controllers.settings import (
    ControllerSettings,
    Observers,
    WorkerSettings,
)
from controllers.shard import shard_plan, shard_settings
from controllers.supervisor import Supervisor, WorkerState
from controllers.topology import Topology
from controllers.wanted import WantedWorkers
from transfer_queue.client import QueueClient
from transfer_queue.errors import QueueError

FINISHED_WORKER_TOPIC = "worker/finished"
_FAREWELL_S = 10.0
_GIVE_BACK_TIMEOUT_S = 5.0


class Phase(enum.Enum):
    """OPENING (shards start) -> WORKING -> STOPPING (own workers) -> LEAVING (until all nodes' workers have stopped,
    since they may need this shard) -> CLOSING (the shard) -> ENDED ; OPENING -> STOPPING"""

    OPENING = "opening"
    WORKING = "working"
    STOPPING = "stopping"
    LEAVING = "leaving"
    CLOSING = "closing"
    ENDED = "ended"


class NodeController:
    """plans: the placement of all nodes. worker_settings: by the name of a worker, or of its kind."""

    def __init__(
        self,
        topology: Topology,
        graph: Graph,
        plans: Sequence[WorkerPlan],
        settings: ControllerSettings,
        worker_settings: Mapping[str, WorkerSettings] | None = None,
        observers: Observers | None = None,
    ) -> None:
        self._topology = topology
        self._graph = graph
        self._plans = tuple(plans)
        self._crew = Crew(topology.node, graph, plans, worker_settings or {})
        self._wanted = WantedWorkers(settings.run_dir, topology.node)
        self._settings = settings
        self._observers = observers or Observers()
        self._shard = shard_plan(topology)
        self._mailbox = Mailbox()
        self._phase = Phase.OPENING
        self._end: NodeEnd | None = None
        self._leave_by = math.inf
        self._retained: dict[str, Announcement] = {}

    def run(self) -> int:
        """Exit code: 0 finished, 1 failed, 128 + signal when ended by one. To be called in the main thread."""
        with ExitStack() as stack:
            self._open(stack)
            if self._settings.queue is None:
                self._links.tell_shard("")
            else:
                self._supervisor.start(self._shard.name)
            self._advance()
            while self._phase is not Phase.ENDED:
                self._wait_and_handle()
                self._supervisor.act()
                self._advance()
        assert self._end is not None, "a run ends for a reason"
        self._observers.on_end(self._end.code, self._end.reason)
        return self._end.code

    def _open(self, stack: ExitStack) -> None:
        """Whatever is opened here is closed by the stack, in the opposite order."""
        settings = self._settings
        stacks.show_on_signal(lambda: [f"controller of node {self._topology.node}: waits for the other nodes"])
        session = stack.enter_context(Session(settings.session_root, self._topology, settings.needed_bytes))
        self._session = session
        reaper = Reaper(session.path)
        stack.callback(reaper.close)
        self._links = Links(self._topology, settings, self._plans, self._mailbox, self)
        stack.callback(self._links.close)
        if settings.queue is None:
            self._links.open()
        else:
            clock = ClockService(
                session.endpoint("clock"), self._links.peers, settings.queue, settings.peer_s, self._on_clock_failure
            )
            self._links.open()
            clock.start()
            stack.callback(clock.close)
        context = zmq.Context()
        stack.callback(context.term)
        self._router = stack.enter_context(context.socket(zmq.ROUTER))
        self._router.setsockopt(zmq.LINGER, 0)
        self._router.bind(session.endpoint("control"))
        nursery = None
        if settings.preload:
            nursery = Nursery(settings.preload, environment(threads=1))
            stack.callback(nursery.close)
        self._supervisor = Supervisor(
            settings.limits, reaper, self._send_stop, self._on_worker, self._observers.on_stall, nursery
        )
        stack.callback(self._supervisor.kill_and_reap)
        self._add_workers()
        for signum in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, signum, signal.signal(signum, self._on_signal))
        stacks.show_on_signal(self._describe)
        stack.callback(stacks.show_on_signal, lambda: ["closing"])

    def _add_workers(self) -> None:
        if self._settings.queue is not None:
            endpoint = self._links.shard_endpoint(self._session)
            clock_endpoint = self._session.endpoint("clock")
            settings = shard_settings(self._graph, self._settings.queue, endpoint, clock_endpoint, self._topology)
            self._crew.add(self._shard, settings)
        for name in self._crew:
            self._supervise(name)

    def _supervise(self, name: str) -> None:
        is_restarted = self._crew.settings(name)["restart"] == "always"
        log_path = self._settings.run_dir / "logs" / f"{name}.log"
        self._supervisor.add(name, partial(self._make_spec, self._crew.plan(name)), is_restarted, log_path)

    def _make_spec(self, plan: WorkerPlan, identity: str) -> WorkerSpec:
        settings = self._crew.settings(plan.name)
        return WorkerSpec(
            name=plan.name,
            worker=plan.worker,
            node=plan.node,
            num_nodes=self._topology.num_nodes,
            rank=plan.rank,
            world_size=plan.world_size,
            index=plan.index,
            threads=plan.threads,
            devices=plan.devices,
            stages=plan.stages,
            target=settings["target"],
            payload=settings["payload"],
            session_dir=str(self._session.path),
            run_dir=str(self._settings.run_dir),
            control_endpoint=self._session.endpoint("control"),
            identity=identity,
            parent=os.getpid(),
            queue_endpoints=self._links.queue_endpoints if plan is not self._shard else (),
            queue_secret=self._links.secret,
            life=self._links.life,
            restore_from=self._links.restore_from,
            events_max_bytes=self._settings.events_max_bytes,
        )

    def _wait_and_handle(self) -> None:
        """One turn: a word of a worker, the end of one, or the mailbox, where other nodes and signals leave theirs."""
        poller = zmq.Poller()
        exits = self._supervisor.exits()
        for source in (self._router, self._mailbox.fd, *exits):
            poller.register(source, zmq.POLLIN)
        due = min(self._supervisor.next_due(), self._leave_by)
        timeout_ms = None if due == math.inf else math.ceil(max(0.0, due - time.monotonic()) * 1000)
        ready = dict(poller.poll(timeout_ms))
        if self._mailbox.fd in ready:
            self._mailbox.run()
        while self._router.poll(0):
            identity, body = self._router.recv_multipart()
            name = self._supervisor.name_of(identity.decode())
            if name is not None:
                self._hear(name, identity.decode(), decode_to_controller(body))
        for descriptor, name in exits.items():
            if descriptor in ready:
                self._supervisor.ended(name)

    def _advance(self) -> None:
        """Takes the step to the next phase, or several, when their time has come."""
        if self._end is not None and self._phase in (Phase.OPENING, Phase.WORKING):
            self._phase = Phase.STOPPING
            names = [name for name in self._crew if name != self._shard.name]
            self._supervisor.stop(names, self._grace_s(self._end))
        if self._phase is Phase.WORKING:
            for name in filter(self._crew.may_start, self._supervisor.names(WorkerState.WAITING)):
                self._supervisor.start(name)
            for kind, count in self._wanted.news().items():
                self._have(kind, count)
        if self._phase is Phase.STOPPING and set(self._supervisor.living()) <= {self._shard.name}:
            self._phase = Phase.LEAVING
            assert self._end is not None, "a run that stops has an end"
            self._leave_by = time.monotonic() + self._grace_s(self._end) + _FAREWELL_S
            self._links.tell_gone()
        if self._phase is Phase.LEAVING and (self._links.is_everybody_gone or time.monotonic() >= self._leave_by):
            self._phase = Phase.CLOSING
            self._leave_by = math.inf
            self._supervisor.stop(self._crew)
        if self._phase is Phase.CLOSING and not self._supervisor.living():
            self._phase = Phase.ENDED

    def _grace_s(self, end: NodeEnd) -> float:
        """What workers get before they are ended by signals: more where nothing has failed, as something is saved."""
        return self._settings.limits.stop_s if end.is_in_order else self._settings.limits.grace_s

    def _have(self, kind: str, count: int) -> None:
        """Workers of the kind join, or the last of them leave."""
        staying, leaving = self._crew.resize(kind, count)
        self._supervisor.stop(leaving)
        for name in staying:
            if name not in self._supervisor.names():
                self._supervise(name)
                self._supervisor.start(name)
            elif name in self._supervisor.names(WorkerState.DONE):
                self._crew.finished.discard(name)
                self._supervisor.start(name)

    def _finish(self, code: int, reason: str) -> None:
        """Ends the run on all nodes. The first reason counts."""
        if self._end is None:
            self._end = NodeEnd(code, reason)
            self._links.tell_end(NodeEnd(code, f"node {self._topology.node}: {reason}"))

    # What workers say.

    def _hear(self, name: str, identity: str, message: ToController) -> None:
        self._supervisor.heard(name)
        if isinstance(message, Heartbeat):
            self._supervisor.heard(name, message)
            self._observers.on_heartbeat(name, message)
        elif isinstance(message, Hello):
            self._send(identity, Welcome(tuple(self._retained.values())))
            if name in self._supervisor.names(WorkerState.STOPPING):
                self._send_stop(identity)
        elif isinstance(message, Ready):
            self._supervisor.ready(name)
            if name == self._shard.name:
                self._links.tell_shard(message.details["endpoint"])
        elif isinstance(message, Report):
            self._observers.on_report(name, message.metrics, message.step)
            self._links.tell_report(name, message)
        elif isinstance(message, Announcement):
            self._announce(message)
        elif isinstance(message, Request):
            self._answer(name, identity, message)
        else:
            self._hear_last_word(name, identity, message)

    def _hear_last_word(self, name: str, identity: str, message: Finished | Failed) -> None:
        if isinstance(message, Failed):
            self._supervisor.failed(name, message)
        else:
            self._supervisor.finished(name)
        self._send(identity, Goodbye())

    def _announce(self, announcement: Announcement) -> None:
        if announcement.everywhere:
            self._links.tell_announcement(announcement)
        self.on_announcement(announcement)

    def _answer(self, name: str, identity: str, request: Request) -> None:
        def answer(result: dict[str, Any], error: str) -> None:
            self._send(identity, Reply(request.number, result, error))

        assert request.method == "rendezvous", f"worker {name} asks for {request.method!r}"
        self._links.find_port(request.argument["worker"], request.argument["name"], answer)

    def _send(self, identity: str, message: ToWorker) -> None:
        """To a worker that has ended it goes nowhere."""
        self._router.send_multipart([identity.encode(), encode(message)])

    def _send_stop(self, identity: str) -> None:
        self._send(identity, Stop())

    # What becomes of workers.

    def _on_worker(self, name: str, state: WorkerState, text: str) -> None:
        self._observers.on_worker(name, state, text)
        if state is WorkerState.FAILED:
            self._finish(1, text)
        elif self._phase is not Phase.WORKING:
            return
        elif name == self._shard.name and state is WorkerState.DONE:
            self._finish(1, f"{name}: the queue's shard has ended by itself")
        elif state in (WorkerState.DOWN, WorkerState.DONE):
            self._give_back(name)
            if state is WorkerState.DONE:
                self._announce(Announcement(FINISHED_WORKER_TOPIC, {"worker": name}, name))

    def _give_back(self, name: str) -> None:
        """What the worker had reserved and will not deliver, or leased and will not acknowledge, goes to others at
        once, before a successor works by its name."""
        if self._settings.queue is None:
            return
        endpoints, secret = self._links.queue_endpoints, self._links.secret
        try:
            with QueueClient(endpoints, secret=secret, timeout_s=_GIVE_BACK_TIMEOUT_S) as queue:
                queue.producer_lost(name)
                queue.consumer_lost(name)
        except QueueError as error:
            self._finish(1, f"the queue was not told of the end of {name}: {error}")

    # What other nodes say, and signals; by the mailbox, so in the loop's thread.

    def on_all_shards(self) -> None:
        if self._phase is Phase.OPENING:
            self._phase = Phase.WORKING

    def on_announcement(self, announcement: Announcement) -> None:
        self._retained[announcement.topic] = announcement
        for identity in self._supervisor.identities():
            self._send(identity, announcement)
        self._observers.on_announcement(announcement.topic, announcement.payload)
        if announcement.topic == FINISHED_TOPIC:
            self._finish(0, f"{announcement.origin} announced the end")
        elif announcement.topic == FINISHED_WORKER_TOPIC:
            self._crew.finished.add(announcement.payload["worker"])
            if self._crew.has_finished:
                self._finish(0, "all drivers have finished")

    def on_report(self, worker: str, report: Report) -> None:
        self._observers.on_report(worker, report.metrics, report.step)

    def on_end(self, node: int, end: NodeEnd) -> None:
        self._end = self._end or end

    def on_lost_node(self, node: int, reason: str) -> None:
        if self._phase not in (Phase.CLOSING, Phase.ENDED):
            self._finish(1, reason)

    def _on_clock_failure(self, reason: str) -> None:
        self._mailbox.post(partial(self.on_lost_node, 0, reason))

    def _describe(self) -> list[str]:
        """For SIGUSR1: where this node stands; its workers are told to say the same in their logs."""
        self._mailbox.post(self._supervisor.ask_for_stacks)
        end = f", ending: {self._end.reason}" if self._end is not None else ""
        own = f"controller of node {self._topology.node}: {self._phase.value}{end}; workers' stacks go to their logs in"
        return [f"{own} {self._settings.run_dir / 'logs'}", *self._supervisor.describe()]

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        self._mailbox.post(partial(self._interrupt, signum))

    def _interrupt(self, signum: int) -> None:
        code = 128 + signum
        if signum == signal.SIGINT and self._end is not None and self._end.code == code:
            self._supervisor.kill()  # the second Ctrl-C: no grace
        self._finish(code, f"ended by {signal.Signals(signum).name}")
