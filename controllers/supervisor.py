"""Keeps a node's workers alive, and brings them down: when to start, restart, signal and give up. Nothing here waits.

The event loop of `node.py` calls in: when a process has ended, when a worker has spoken, and when `next_due` has come.
How a process is started and killed is `process.py`'s.
"""

from __future__ import annotations

import enum
import math
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from controllers.messages import Failed, Heartbeat, WorkerSpec
from controllers.nursery import Nursery
from controllers.process import WorkerProcess, exit_text, log_tail
from controllers.reaper import Reaper

_TAIL_LINES = 12
_AT_WORK = Heartbeat("", 0.0)
_DUMP_S = 0.3
"""What a silent worker gets to write its stacks to the log before it is killed."""
_DOUBT_S = 0.5
"""From finding a worker silent to believing it: if the controller itself stood still, words may be on their way."""


class WorkerState(enum.Enum):
    """WAITING -> STARTING -> RUNNING -> DONE ; STARTING, RUNNING -> DOWN -> STARTING (restarted)
    STARTING, RUNNING -> FAILED (not restarted, or too often) ; STARTING, RUNNING -> STOPPING -> DONE ; DOWN -> DONE"""

    WAITING = "waiting"
    STARTING = "starting"
    RUNNING = "running"
    DOWN = "down"
    STOPPING = "stopping"
    DONE = "done"
    FAILED = "failed"

    @property
    def is_living(self) -> bool:
        return self in (WorkerState.STARTING, WorkerState.RUNNING, WorkerState.STOPPING)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """start_s: from a worker's start to its first word; heartbeat_s: between two words; beyond, it is killed. stall_s:
    at one and the same thing; beyond, it is named and its stacks go to its log, for it may be right. grace_s: from Stop
    to SIGTERM, or stop_s at the end of a run in good order; kill_s: from there to SIGKILL. max_restarts: in a
    row; a worker that lived for `healthy_s` starts counting anew. Restart n waits backoff_s·2^n, at most
    max_backoff_s."""

    start_s: float = 60.0
    heartbeat_s: float = 60.0
    stall_s: float = 300.0
    grace_s: float = 10.0
    stop_s: float = 30.0
    kill_s: float = 3.0
    max_restarts: int = 5
    healthy_s: float = 120.0
    backoff_s: float = 0.2
    max_backoff_s: float = 10.0

    def __post_init__(self) -> None:
        if self.heartbeat_s < 3:
            raise ValueError(f"heartbeat_s: {self.heartbeat_s}; workers speak once a second, so at least 3")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts: {self.max_restarts}; must not be negative")


Listener = Callable[[str, WorkerState, str], None]
StallListener = Callable[[str, str], None]


@dataclass
class _Member:
    """One worker and, while it lives, its process. `signals`: (when, which), soonest first."""

    name: str
    make_spec: Callable[[str], WorkerSpec]
    is_restarted: bool
    log_path: Path
    state: WorkerState = WorkerState.WAITING
    process: WorkerProcess | None = None
    incarnation: int = 0
    restarts: int = 0
    restart_at: float = math.inf
    started_at: float = 0.0
    heard_at: float = 0.0
    doubted_until: float = 0.0
    heartbeat: Heartbeat = _AT_WORK
    is_stalled: bool = False
    failure: str = ""
    is_finished: bool = False
    has_been_ready: bool = False
    signals: list[tuple[float, int]] = field(default_factory=list)

    @property
    def identity(self) -> str:
        return f"{self.name}:{self.incarnation}"


class Supervisor:
    """listener(worker, state, text) hears every change of state, on_stall(worker, text) of who does not come on.
    nursery: where workers are born, if there is one."""

    def __init__(
        self,
        limits: Limits,
        reaper: Reaper,
        send_stop: Callable[[str], None],
        listener: Listener,
        on_stall: StallListener,
        nursery: Nursery | None = None,
    ) -> None:
        self._limits = limits
        self._reaper = reaper
        self._send_stop = send_stop
        self._listener = listener
        self._on_stall = on_stall
        self._nursery = nursery
        self._members: dict[str, _Member] = {}

    def add(self, name: str, make_spec: Callable[[str], WorkerSpec], is_restarted: bool, log_path: Path) -> None:
        """`make_spec(identity)` is called at each start."""
        assert name not in self._members, f"worker {name} added twice"
        self._members[name] = _Member(name, make_spec, is_restarted, log_path)

    def start(self, name: str) -> None:
        self._start(self._members[name])

    def names(self, *states: WorkerState) -> list[str]:
        """Of workers in one of these states; of all, if none is named."""
        return [member.name for member in self._members.values() if not states or member.state in states]

    def living(self) -> list[str]:
        return [member.name for member in self._members.values() if member.state.is_living]

    def exits(self) -> dict[int, str]:
        """Descriptor that becomes readable at a worker's end -> the worker."""
        return {member.process.pidfd: member.name for member in self._members.values() if member.process is not None}

    def name_of(self, identity: str) -> str | None:
        """None: a late word of an incarnation that has ended."""
        member = self._members.get(identity.rpartition(":")[0])
        return member.name if member is not None and member.identity == identity else None

    def identities(self) -> list[str]:
        """Of the workers that have said hello and live."""
        return [member.identity for member in self._members.values() if member.state.is_living and member.heard_at > 0]

    def heard(self, name: str, heartbeat: Heartbeat | None = None) -> None:
        member = self._members[name]
        member.heard_at = time.monotonic()
        member.doubted_until = 0.0
        member.heartbeat = heartbeat or member.heartbeat
        was_stalled, member.is_stalled = member.is_stalled, member.heartbeat.since_s > self._limits.stall_s
        if member.is_stalled and not was_stalled and member.process is not None:
            what, since_s = member.heartbeat.waiting_for, member.heartbeat.since_s
            self._on_stall(name, f"has waited for {what} for {since_s:.0f} s; its stacks are in {member.log_path}")
            member.process.signal(signal.SIGUSR1)

    def ready(self, name: str) -> None:
        member = self._members[name]
        if member.state is WorkerState.STARTING:
            member.has_been_ready = True
            self._change(member, WorkerState.RUNNING, f"ready after {time.monotonic() - member.started_at:.1f} s")

    def finished(self, name: str) -> None:
        """Its target has returned; what is left of the process gets the grace to end."""
        member = self._members[name]
        member.is_finished = True
        self._schedule_signals(member, time.monotonic() + self._limits.grace_s)

    def failed(self, name: str, failure: Failed) -> None:
        member = self._members[name]
        member.failure = failure.reason
        self._schedule_signals(member, time.monotonic() + self._limits.grace_s)

    def ended(self, name: str) -> None:
        """The process has ended: restart it, take note, or give up."""
        member = self._members[name]
        assert member.process is not None, f"worker {name} has no process"
        code = member.process.reap()
        member.process = None
        member.signals = []
        if member.state is WorkerState.STOPPING:
            self._change(member, WorkerState.DONE, f"stopped: {_cause(member, code)}")
        elif member.is_finished:
            self._change(member, WorkerState.DONE, "finished")
        else:
            self._mourn(member, code)

    def stop(self, names: Iterable[str], grace_s: float | None = None) -> None:
        """Stop, then, after grace_s or what the limits say, SIGTERM, then SIGKILL. Returns at once; the ends come by
        `ended`."""
        grace_s = self._limits.grace_s if grace_s is None else grace_s
        for member in [self._members[name] for name in names]:
            if member.state in (WorkerState.STARTING, WorkerState.RUNNING):
                self._send_stop(member.identity)
                self._schedule_signals(member, time.monotonic() + grace_s)
                self._change(member, WorkerState.STOPPING, "")
            elif member.state in (WorkerState.WAITING, WorkerState.DOWN):
                member.restart_at = math.inf
                self._change(member, WorkerState.DONE, "not running")

    def describe(self) -> list[str]:
        """A line a worker: its state, and what it waited for when last heard."""
        now = time.monotonic()
        lines = []
        for member in self._members.values():
            process = f", process {member.process.pid}" if member.process is not None else ""
            last = member.heartbeat
            doing = f"waits for {last.waiting_for}, for {last.since_s:.0f} s" if last.waiting_for else "at work"
            heard = f", heard {now - member.heard_at:.1f} s ago: {doing}" if member.heard_at else ""
            lines.append(f"{member.name}: {member.state.value}{process}{heard}")
        return lines

    def ask_for_stacks(self) -> None:
        """Every living worker writes its stacks to its log."""
        for member in self._members.values():
            if member.process is not None:
                member.process.signal(signal.SIGUSR1)

    def kill(self) -> None:
        """Everybody, now."""
        for member in self._members.values():
            if member.process is not None:
                member.process.signal_group(signal.SIGKILL)

    def kill_and_reap(self) -> None:
        """Leaves no process, whatever has happened."""
        self.kill()
        for member in self._members.values():
            if member.process is not None:
                member.process.reap()
                member.process = None

    def next_due(self) -> float:
        """When `act` has to be called next, on the monotonic clock."""
        return min((self._due(member) for member in self._members.values()), default=math.inf)

    def act(self) -> None:
        """Does what is due."""
        now = time.monotonic()
        for member in self._members.values():
            if member.restart_at <= now:
                self._start(member)
            elif self._silent_at(member) <= now and not member.doubted_until:
                member.doubted_until = now + _DOUBT_S
            elif self._silent_at(member) <= now:
                self._give_up_on_silent(member, now)
            while member.process is not None and member.signals and member.signals[0][0] <= now:
                _send(member.process, member.signals.pop(0)[1])

    def _start(self, member: _Member) -> None:
        member.incarnation += 1
        member.restart_at = math.inf
        member.started_at = time.monotonic()
        member.heard_at = 0.0
        member.doubted_until = 0.0
        member.heartbeat = _AT_WORK
        member.failure = ""
        member.is_finished = False
        spec = member.make_spec(member.identity)
        member.process = WorkerProcess(spec, member.log_path, self._reaper, self._nursery)
        self._change(member, WorkerState.STARTING, f"process {member.process.pid}")

    def _mourn(self, member: _Member, code: int) -> None:
        lived_s = time.monotonic() - member.started_at
        member.restarts = 0 if lived_s > self._limits.healthy_s else member.restarts
        why = _cause(member, code)
        # What fails by itself before it was ever ready would fail again.
        is_hopeless = code > 0 and not member.has_been_ready
        if member.is_restarted and not is_hopeless and member.restarts < self._limits.max_restarts:
            delay_s = min(self._limits.backoff_s * 2**member.restarts, self._limits.max_backoff_s)
            member.restarts += 1
            member.restart_at = time.monotonic() + delay_s
            self._change(member, WorkerState.DOWN, f"{why}; restart {member.restarts} in {delay_s:.1f} s")
            return
        often = f" {member.restarts + 1} times in a row" if member.is_restarted and not is_hopeless else ""
        self._change(
            member,
            WorkerState.FAILED,
            f"worker {member.name} died{often}: {why}; its log, {member.log_path}, ends:\n"
            f"{log_tail(member.log_path, _TAIL_LINES)}",
        )

    def _give_up_on_silent(self, member: _Member, now: float) -> None:
        last = member.heartbeat
        doing = f"waiting for {last.waiting_for} ({last.since_s:.0f} s by then)" if last.waiting_for else "at work"
        silence_s = now - max(member.heard_at, member.started_at)
        heard = f"when last heard it was {doing}" if member.heard_at else "it has never been heard"
        member.failure = f"silent for {silence_s:.1f} s, {heard}; killed"
        member.signals = [(now, signal.SIGUSR1), (now + _DUMP_S, signal.SIGKILL)]

    def _schedule_signals(self, member: _Member, first: float) -> None:
        member.signals = [(first, signal.SIGTERM), (first + self._limits.kill_s, signal.SIGKILL)]

    def _silent_at(self, member: _Member) -> float:
        """When the worker will have been silent for too long. One that is to be signalled is no longer watched."""
        if member.process is None or member.signals:
            return math.inf
        if member.heard_at == 0:
            return max(member.started_at + self._limits.start_s, member.doubted_until)
        return max(member.heard_at + self._limits.heartbeat_s, member.doubted_until)

    def _due(self, member: _Member) -> float:
        first_signal = member.signals[0][0] if member.process is not None and member.signals else math.inf
        return min(member.restart_at, first_signal, self._silent_at(member))

    def _change(self, member: _Member, state: WorkerState, text: str) -> None:
        member.state = state
        self._listener(member.name, state, text)


def _cause(member: _Member, code: int) -> str:
    return f"{member.failure}, {exit_text(code)}" if member.failure else exit_text(code)


def _send(process: WorkerProcess, signum: int) -> None:
    if signum == signal.SIGUSR1:
        process.signal(signum)
    else:
        process.signal_group(signum)
