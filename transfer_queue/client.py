"""Two faces of one client: blocking, and asyncio. Both drive the generators of `verbs.py`, and own only sockets and
small puts that wait to go together."""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from transfer_queue import wire
from transfer_queue.config import HIGH_WATER_MARK, check_endpoint
from transfer_queue.errors import QueueClosed, QueueError, QueueTimeout, WireError
from transfer_queue.frames import pack, unpack
from transfer_queue.gathering import GATHER_BYTES, GATHER_ROWS, Part
from transfer_queue.rows import Column, RowKey
from transfer_queue.security import secure_client
from transfer_queue.verbs import Answer, Hear, Send, Taken, Verb, Verbs

R = TypeVar("R")
DEFAULT_WAIT_S = 10.0
DEFAULT_TIMEOUT_S = 30.0
MAX_NAME = 60


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
        self._sockets = _connect(context, self._verbs.endpoints, secret, name)
        self._gathered: list[Part] = []
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
        return _count_or_raise(self._run(self._verbs.put([_part(keys, columns, versions)])))

    def put_soon(
        self, keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] | None = None
    ) -> None:
        """Like `put`, but together with others like it: at the latest before the next other verb, and by `flush`.
        Raises what the shard refused of those that it sends."""
        self._gathered.append(_part(keys, columns, versions))
        rows = sum(len(part.keys) for part in self._gathered)
        if rows >= GATHER_ROWS or sum(part.num_bytes for part in self._gathered) >= GATHER_BYTES:
            self.flush()

    def flush(self) -> int:
        """Sends what `put_soon` has gathered; how many of its rows are still wanted."""
        parts, self._gathered = self._gathered, []
        return _count_or_raise(self._drive(self._verbs.put(parts))) if parts else 0

    def take(
        self,
        consumer: str,
        max_rows: int = 1,
        budget: tuple[str, int] | None = None,
        update: int | None = None,
        incarnation: int = 0,
        wait_s: float = DEFAULT_WAIT_S,
    ) -> Taken:
        """Rows with all of the consumer's columns, earliest deadline first; none after wait_s. budget: (column, most of
        the sum of its lengths). update: that of a training take. Several shards may each give max_rows."""
        return self._run(self._verbs.take(consumer, max_rows, budget, update, incarnation, wait_s))

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

    def save(self, directory: str) -> int:
        """Every shard writes a file there, from which a queue of any number of shards can go on (`restore_dir`); how
        many rows. Meant for a moment between two updates: what an update holds is saved as if it were not in it."""
        return self._run(self._verbs.save(directory))

    def introspect(self) -> dict[str, Any]:
        """What each shard holds, by endpoint. Consumes nothing."""
        return self._run(self._verbs.introspect())

    def close(self) -> None:
        """Sends what has gathered."""
        if self._sockets and self._gathered:
            self.flush()
        for socket in self._sockets:
            socket.close()
        self._sockets = []
        self._verbs.close()

    def _run(self, verb: Verb[R]) -> R:
        if self._gathered:
            self.flush()
        return self._drive(verb)

    def _drive(self, verb: Verb[R]) -> R:
        assert threading.get_ident() == self._thread, "a QueueClient belongs to the thread that made it"
        if not self._sockets:
            raise QueueClosed("this client has been closed")
        asked: list[int] = []
        try:
            step = next(verb)
            while True:
                if isinstance(step, Send):
                    asked.append(step.request.id)
                    self._asked[step.request.id] = step
                    self._send([step])
                    step = next(verb)
                else:
                    answer = self._hear(step)
                    step = verb.throw(self._timeout(step)) if answer is None else verb.send(answer)
        except StopIteration as end:
            return end.value
        finally:
            for number in asked:
                unheard = self._asked.pop(number, None)
                if unheard is not None:
                    self._send(self._verbs.abandon(unheard, self._answers.pop(number, None)))

    def _send(self, steps: Sequence[Send]) -> None:
        for step in steps:
            self._sockets[step.endpoint].send_multipart(frames_of(step), copy=False)

    def _timeout(self, hear: Hear) -> QueueTimeout:
        return _timeout(self._verbs, [self._asked[number] for number in hear.ids], hear.timeout_s)

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
            for socket, _ in self._poller.poll(int(left_s * 1000) + 1):
                answer = answer_of(socket.recv_multipart(copy=False))
                if answer.id in self._asked:
                    self._answers[answer.id] = answer
                else:
                    self._send(self._verbs.handle_stray(answer))


class AsyncQueueClient:
    """The same verbs, awaited. Used from one event loop; any number of verbs may be under way at once."""

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
        context = zmq.asyncio.Context.shadow(zmq.Context.instance())
        self._sockets = _connect(context, self._verbs.endpoints, secret, name)
        self._asked: dict[int, Send] = {}
        self._gathered: list[tuple[Part, asyncio.Future[int]]] = []
        self._putting: asyncio.Task[None] | None = None
        self._answers: dict[int, asyncio.Future[Answer]] = {}
        self._readers: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> AsyncQueueClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def announce(self, producer: str, version: int) -> None:
        await self._run(self._verbs.announce(producer, version))

    async def reserve(
        self,
        producer: str,
        num_groups: int,
        group_size: int,
        partition: str = "train",
        row_bytes: int = 0,
        wait_s: float = DEFAULT_WAIT_S,
    ) -> list[wire.Reservation]:
        return await self._run(self._verbs.reserve(producer, num_groups, group_size, partition, row_bytes, wait_s))

    async def put(
        self, keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] | None = None
    ) -> int:
        """Small puts that are made while one is under way go together, after it."""
        part = _part(keys, columns, versions)
        if part.num_bytes > GATHER_BYTES:
            return _count_or_raise(await self._run(self._verbs.put([part])))
        outcome: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._gathered.append((part, outcome))
        if self._putting is None:
            self._putting = asyncio.create_task(self._put_gathered())
        return await outcome

    async def _put_gathered(self) -> None:
        while self._gathered:
            gathered, self._gathered = self._gathered, []
            outcomes: Sequence[int | Exception]
            try:
                outcomes = await self._run(self._verbs.put([part for part, _ in gathered]))
            except QueueError as error:
                outcomes = [error] * len(gathered)
            for (_, future), outcome in zip(gathered, outcomes, strict=True):
                if future.done():
                    continue
                if isinstance(outcome, Exception):
                    future.set_exception(outcome)
                else:
                    future.set_result(outcome)
        self._putting = None

    async def take(
        self,
        consumer: str,
        max_rows: int = 1,
        budget: tuple[str, int] | None = None,
        update: int | None = None,
        incarnation: int = 0,
        wait_s: float = DEFAULT_WAIT_S,
    ) -> Taken:
        return await self._run(self._verbs.take(consumer, max_rows, budget, update, incarnation, wait_s))

    async def ack(self, consumer: str, keys: Sequence[RowKey]) -> int:
        return await self._run(self._verbs.ack(consumer, keys))

    async def commit(self, incarnation: int, update: int, keys: Sequence[RowKey]) -> int:
        return await self._run(self._verbs.commit(incarnation, update, keys))

    async def close_update(self, incarnation: int, update: int) -> None:
        await self._run(self._verbs.close_update(incarnation, update))

    async def drop(self, keys: Sequence[RowKey], reason: str, again: bool = False) -> int:
        return await self._run(self._verbs.drop(keys, reason, again))

    async def producer_lost(self, producer: str) -> int:
        return await self._run(self._verbs.producer_lost(producer))

    async def consumer_lost(self, client: str) -> int:
        return await self._run(self._verbs.consumer_lost(client))

    async def save(self, directory: str) -> int:
        return await self._run(self._verbs.save(directory))

    async def introspect(self) -> dict[str, Any]:
        return await self._run(self._verbs.introspect())

    async def close(self) -> None:
        """Verbs under way end with QueueClosed."""
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._fail(QueueClosed("this client has been closed"))
        for socket in self._sockets:
            socket.close()
        self._sockets = []
        if self._putting is not None:
            await self._putting
        self._verbs.close()

    async def _run(self, verb: Verb[R]) -> R:
        if not self._sockets:
            raise QueueClosed("this client has been closed")
        if not self._readers:
            self._readers = [asyncio.create_task(self._read(socket)) for socket in self._sockets]
        asked: list[int] = []
        try:
            step = next(verb)
            while True:
                if isinstance(step, Send):
                    asked.append(step.request.id)
                    self._asked[step.request.id] = step
                    self._answers[step.request.id] = asyncio.get_running_loop().create_future()
                    await self._sockets[step.endpoint].send_multipart(frames_of(step), copy=False)
                    step = next(verb)
                else:
                    answer = await self._hear(step)
                    step = verb.throw(self._timeout(step)) if answer is None else verb.send(answer)
        except StopIteration as end:
            return end.value
        finally:
            for number in asked:
                self._forget(number)

    def _forget(self, number: int) -> None:
        unheard = self._asked.pop(number, None)
        if unheard is None:
            return
        future = self._answers.pop(number)
        has_answer = future.done() and not future.cancelled() and future.exception() is None
        self._send(self._verbs.abandon(unheard, future.result() if has_answer else None))
        future.cancel()

    def _send(self, steps: Sequence[Send]) -> None:
        """Without waiting: the socket keeps what it cannot send at once."""
        for step in steps:
            if self._sockets:
                self._sockets[step.endpoint].send_multipart(frames_of(step), copy=False)

    def _timeout(self, hear: Hear) -> QueueTimeout:
        return _timeout(self._verbs, [self._asked[number] for number in hear.ids], hear.timeout_s)

    async def _hear(self, hear: Hear) -> Answer | None:
        futures = [self._answers[number] for number in hear.ids]
        done, _ = await asyncio.wait(futures, timeout=hear.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            return None
        answer = done.pop().result()
        del self._asked[answer.id], self._answers[answer.id]
        return answer

    async def _read(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            frames = await socket.recv_multipart(copy=False)
            try:
                answer = answer_of(frames)
            except WireError as error:
                self._fail(error)
                continue
            waiting = self._answers.get(answer.id)
            if waiting is None:
                self._send(self._verbs.handle_stray(answer))
            elif not waiting.done():
                waiting.set_result(answer)

    def _fail(self, error: QueueError) -> None:
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(error)


def frames_of(step: Send) -> list[Any]:
    """What a step puts on the socket."""
    request = step.request
    if not isinstance(request, wire.Put) or request.placed is not None:
        return [wire.encode(request)]
    headers, frames = pack(step.columns)
    return [wire.encode(wire.Put(request.id, request.spans, headers, request.versions)), *frames]


def answer_of(frames: Sequence[zmq.Frame]) -> Answer:
    reply = wire.decode_reply(frames[0].buffer)
    columns: dict[str, Column] = {}
    if isinstance(reply, wire.Delivered) and reply.spans and not reply.placed:
        columns = unpack(reply.columns, [frame.buffer for frame in frames[1:]], sum(map(len, reply.spans)))
    return Answer(reply.id, reply, columns)


def _part(keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] | None) -> Part:
    if versions is not None and len(versions) != len(keys):
        raise ValueError(f"versions: {len(versions)} for {len(keys)} rows; one a row")
    return Part(keys, columns, versions if versions is not None else ())


def _count_or_raise(outcomes: Sequence[int | QueueError]) -> int:
    for outcome in outcomes:
        if isinstance(outcome, QueueError):
            raise outcome
    return sum(outcome for outcome in outcomes if isinstance(outcome, int))


def _timeout(verbs: Verbs, unheard: Sequence[Send], timeout_s: float) -> QueueTimeout:
    names = ", ".join(f"{verbs.endpoints[step.endpoint]} ({type(step.request).__name__.lower()})" for step in unheard)
    return QueueTimeout(f"no answer from {names} in {timeout_s:.1f} s")


def _connect(context: Any, endpoints: Sequence[str], secret: str, name: str) -> list[Any]:
    """Each with an address that begins with the client's name and is nobody else's."""
    if len(name) > MAX_NAME:
        raise ValueError(f"name: {name!r}; at most {MAX_NAME} characters")
    for endpoint in endpoints:
        check_endpoint(endpoint, secret)
    sockets = []
    for endpoint in endpoints:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.ROUTING_ID, f"{name}/{secrets.token_hex(8)}".encode())
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        if secret and endpoint.startswith("tcp://"):
            secure_client(socket, secret)
        socket.connect(endpoint)
        sockets.append(socket)
    return sockets
