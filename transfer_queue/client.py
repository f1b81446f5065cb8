"""The blocking face of a client. It drives the generators of `verbs.py`, and owns only sockets, small puts that wait to
go together and the put that nobody waits for yet. `async_client.py` is the other face."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, cast

import zmq

from transfer_queue import parts, wire
from transfer_queue.errors import QueueClosed, QueueError, QueueTimeout
from transfer_queue.gathering import GATHER_BYTES, GATHER_ROWS, Part, count_or_raise, part_of
from transfer_queue.rows import Column, RowKey
from transfer_queue.sockets import DEFAULT_TIMEOUT_S, DEFAULT_WAIT_S, answer_of, connect, frames_of, timeout_of
from transfer_queue.steps import Answer, Hear, Send, Taken, Verb
from transfer_queue.verbs import Verbs

R = TypeVar("R")
LINGER_S = 1e-4
"""For which a client that waits for shards on its node looks again and again, giving its core to whoever wants it,
before it sleeps: being woken takes about as long as a shard does for most answers. Over TCP that would only take time
from those who move the bytes."""


class _Underway(Generic[R]):
    """A verb that has said what it can and waits to hear something; once it has ended `hear` is None. asked: the ids of
    its requests."""

    __slots__ = ("asked", "hear", "result", "verb")

    def __init__(self, verb: Verb[R]) -> None:
        self.verb = verb
        self.asked: list[int] = []
        self.hear: Hear | None = None
        self.result: R | None = None


class QueueClient:
    """Blocking; used from the thread that made it. endpoints: one, or several with the local shard first. timeout_s:
    how long a shard may take beyond the wait that a verb names; then QueueTimeout says which one. name: by which
    `consumer_lost` knows its leases. shares_memory: whether rows of a shard on this node stay in shared memory until
    they are taken."""

    def __init__(
        self,
        endpoints: str | Sequence[str],
        *,
        secret: str = "",
        timeout_s: float = DEFAULT_TIMEOUT_S,
        name: str = "",
        shares_memory: bool = True,
    ) -> None:
        self._verbs = Verbs([endpoints] if isinstance(endpoints, str) else endpoints, timeout_s, shares_memory)
        self._thread = threading.get_ident()
        context: zmq.Context = zmq.Context.instance()
        self._sockets = connect(context, self._verbs.endpoints, secret, name)
        self._gathered: list[Part] = []
        self._putting: _Underway[Sequence[int | QueueError]] | None = None
        self._wanted = 0
        self._may_linger = all(endpoint.startswith("ipc://") for endpoint in self._verbs.endpoints)
        self._poller = zmq.Poller()
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)
        self._asked: dict[int, Send] = {}
        self._answers: dict[int, Answer] = {}

    def __enter__(self) -> QueueClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def announce(self, producer: str, version: int) -> None:
        """The engine of this producer has loaded that version."""
        self._run(self._verbs.announce(producer, version))

    def reserve(
        self,
        producer: str,
        num_groups: int,
        group_size: int,
        partition: str = "train",
        row_bytes: int = 0,
        wait_s: float = DEFAULT_WAIT_S,
    ) -> list[wire.Reservation]:
        """At least one group and at most num_groups of the local shard, as soon as there is room; none after wait_s.
        row_bytes: the most that all columns of a row will take."""
        return self._run(self._verbs.reserve(producer, num_groups, group_size, partition, row_bytes, wait_s))

    def put(self, keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] | None = None) -> int:
        """Atomic in each shard, and idempotent. versions: the oldest token of each row, when the put carries the
        tokens. Returns how many rows are still wanted: those that were dropped or lost meanwhile are ignored."""
        return count_or_raise(self._run(self._verbs.put([part_of(keys, columns, versions)])))

    def put_soon(
        self, keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] | None = None
    ) -> None:
        """Like `put`, but together with others like it, and without waiting for the answer. It is sent before the next
        other verb at the latest; until then the columns must not be changed. What the shard refuses of it is raised by
        a later `put_soon`, `flush` or `close`, or by a verb that would send what has gathered since."""
        self._gathered.append(part_of(keys, columns, versions))
        rows = sum(len(part.keys) for part in self._gathered)
        if rows >= GATHER_ROWS or sum(part.num_bytes for part in self._gathered) >= GATHER_BYTES:
            self._send_gathered()

    def flush(self) -> int:
        """Waits until all that `put_soon` was given has arrived. How many of the rows that it was given since the last
        flush are still wanted."""
        self._send_gathered()
        putting, self._putting = self._putting, None
        self._count_wanted(putting)
        wanted, self._wanted = self._wanted, 0
        return wanted

    def take(
        self,
        consumer: str,
        max_rows: int = 1,
        budget: tuple[str, int] | None = None,
        update: int | None = None,
        incarnation: int = 0,
        wait_s: float = DEFAULT_WAIT_S,
        done: Sequence[RowKey] = (),
    ) -> Taken:
        """Rows with all of the consumer's columns, earliest deadline first; none after wait_s. budget: (column, most of
        the sum of its lengths). update: that of a training take. Several shards may each give max_rows. done: rows of
        earlier takes, acknowledged by the way, as `ack` would before this take."""
        return self._run(self._verbs.take(consumer, max_rows, budget, update, incarnation, wait_s, done))

    def ack(self, consumer: str, keys: Sequence[RowKey]) -> int:
        """The consumer is done with these rows; how many it was not done with before."""
        return self._run(self._verbs.ack(consumer, keys))

    def commit(self, incarnation: int, update: int, keys: Sequence[RowKey]) -> int:
        """Every rank has stepped: these rows are trained."""
        return self._run(self._verbs.commit(incarnation, update, keys))

    def close_update(self, incarnation: int, update: int) -> None:
        """Ends an update with the rows it has, as a run's last one may: takes for it are told that it is closed. Raises
        RowRefused if it is empty, or if rows are outstanding that would be due with it."""
        self._run(self._verbs.close_update(incarnation, update))

    def begin(self, incarnation: int, version: int, lost: Sequence[str] = ()) -> None:
        """A trainer starts at `version`, after its own death or that of a shard: what earlier incarnations took for
        updates from that one on is ready again, and rows of later policies expire. lost: names of shards that are gone
        and will not be replaced. Raises StaleIncarnation if a later one has begun."""
        self._run(self._verbs.begin(incarnation, version, lost))

    def drop(self, keys: Sequence[RowKey], reason: str, again: bool = False) -> int:
        """Gives up the groups of these rows, whole; how many rows. Their capacity comes back. again: so do their
        prompts, up to the shard's `max_attempts`."""
        return self._run(self._verbs.drop(keys, reason, again))

    def producer_lost(self, producer: str) -> int:
        """Its unfinished groups will be reserved by somebody else; how many."""
        return self._run(self._verbs.producer_lost(producer))

    def consumer_lost(self, client: str) -> int:
        """What clients of this name have leased is ready again; how many rows."""
        return self._run(self._verbs.consumer_lost(client))

    def save(self, directory: str, with_rows: bool = True) -> int:
        """Every shard writes a file there, below its `save_dir` (where a relative path begins), from which a queue of
        any number of shards can go on (`restore_dir`); how many rows. Meant for a moment between two updates: what an
        update holds is saved as if it were not in it. with_rows: or else all groups that are not done begin anew."""
        return self._run(self._verbs.save(directory, with_rows))

    def introspect(self) -> dict[str, Any]:
        """What each shard holds, by endpoint. Consumes nothing."""
        return self._run(self._verbs.introspect())

    def close(self) -> None:
        """After a flush."""
        try:
            if self._sockets:
                self.flush()
        finally:
            for socket in self._sockets:
                socket.close()
            self._sockets = []
            self._verbs.close()

    def _run(self, verb: Verb[R]) -> R:
        if self._gathered:
            self._send_gathered()
        return self._finish(self._begin(verb))

    def _send_gathered(self) -> None:
        """Without waiting for an answer, but for that to what was sent before."""
        if not self._gathered:
            return
        if not self._verbs.has_located:  # or else the verb would wait for that before it says anything
            self._finish(self._begin(self._verbs.locate()))
        parts, self._gathered = self._gathered, []
        earlier, self._putting = self._putting, self._begin(self._verbs.put(parts))
        self._count_wanted(earlier)

    def _count_wanted(self, putting: _Underway[Sequence[int | QueueError]] | None) -> None:
        if putting is not None:
            self._wanted += count_or_raise(self._finish(putting))

    # Driving a verb

    def _begin(self, verb: Verb[R]) -> _Underway[R]:
        assert threading.get_ident() == self._thread, "a QueueClient belongs to the thread that made it"
        if not self._sockets:
            raise QueueClosed("this client has been closed")
        underway = _Underway(verb)
        self._go_on(underway, verb.__next__)
        return underway

    def _finish(self, underway: _Underway[R]) -> R:
        verb = underway.verb
        try:
            while underway.hear is not None:
                answer = self._hear(underway.hear)
                if answer is None:
                    self._go_on(underway, partial(verb.throw, self._timeout(underway.hear)))
                else:
                    self._go_on(underway, partial(verb.send, answer))
            return cast(R, underway.result)
        finally:
            self._forget(underway)

    def _go_on(self, underway: _Underway[Any], resume: Callable[[], Send | Hear]) -> None:
        """Sends what the verb says, until it waits for something or ends."""
        try:
            step = resume()
            while isinstance(step, Send):
                underway.asked.append(step.request.id)
                self._asked[step.request.id] = step
                self._send([step])
                step = next(underway.verb)
            underway.hear = step
        except BaseException as error:
            underway.hear = None
            self._forget(underway)
            if not isinstance(error, StopIteration):
                raise
            underway.result = error.value

    def _forget(self, underway: _Underway[Any]) -> None:
        """What it has not heard nobody waits for any more."""
        for number in underway.asked:
            unheard = self._asked.pop(number, None)
            if unheard is not None:
                self._send(self._verbs.abandon(unheard, self._answers.pop(number, None)))
        underway.asked.clear()

    def _send(self, steps: Sequence[Send]) -> None:
        for step in steps:
            parts.send(self._sockets[step.endpoint], frames_of(step))

    def _timeout(self, hear: Hear) -> QueueTimeout:
        return timeout_of(self._verbs, [self._asked[number] for number in hear.ids], hear.timeout_s)

    def _linger(self, most_s: float) -> list[tuple[zmq.Socket, int]]:
        """Sockets, with events, that have something within `LINGER_S`."""
        end_s = time.perf_counter() + min(LINGER_S, most_s) if self._may_linger else 0.0
        while time.perf_counter() < end_s:
            found = [(socket, int(zmq.POLLIN)) for socket in self._sockets if parts.has_message(socket)]
            if found:
                return found
            os.sched_yield()
        return []

    def _hear(self, hear: Hear) -> Answer | None:
        give_up_s = time.monotonic() + hear.timeout_s
        while True:
            for number in hear.ids:
                if number in self._answers:
                    del self._asked[number]
                    return self._answers.pop(number)
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                return None
            for socket, _ in self._linger(left_s) or self._poller.poll(int(left_s * 1000) + 1):
                answer = answer_of(parts.receive(socket, num_small=1))
                if answer.id in self._asked:
                    self._answers[answer.id] = answer
                else:
                    self._send(self._verbs.handle_stray(answer))
