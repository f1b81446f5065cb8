"""Two faces of one client: blocking, and asyncio. Both drive the generators of `verbs.py`, and own only sockets."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from transfer_queue import wire
from transfer_queue.config import HIGH_WATER_MARK, check_endpoint
from transfer_queue.errors import QueueClosed, QueueError, QueueTimeout, WireError
from transfer_queue.rows import Column, RowKey
from transfer_queue.security import secure_client
from transfer_queue.verbs import Answer, Hear, Send, Taken, Verb, Verbs

R = TypeVar("R")
DEFAULT_WAIT_S = 10.0
DEFAULT_TIMEOUT_S = 30.0


class QueueClient:
    """Blocking; used from the thread that made it. endpoints: one, or several with the local shard first. timeout_s:
    how long a shard may take beyond the wait that a verb names; then QueueTimeout says which one."""

    def __init__(
        self, endpoints: str | Sequence[str], *, secret: str = "", timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self._verbs = Verbs([endpoints] if isinstance(endpoints, str) else endpoints, timeout_s)
        self._thread = threading.get_ident()
        context: zmq.Context = zmq.Context.instance()
        self._sockets = _connect(context, self._verbs.endpoints, secret)
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
        return self._run(self._verbs.put(keys, columns, versions))

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

    def drop(self, keys: Sequence[RowKey], reason: str) -> int:
        """Gives up the groups of these rows, whole; how many rows. Their capacity comes back, their prompts do not."""
        return self._run(self._verbs.drop(keys, reason))

    def producer_lost(self, producer: str) -> int:
        """Its unfinished groups will be reserved by somebody else; how many."""
        return self._run(self._verbs.producer_lost(producer))

    def introspect(self) -> dict[str, Any]:
        """What each shard holds, by endpoint. Consumes nothing."""
        return self._run(self._verbs.introspect())

    def close(self) -> None:
        for socket in self._sockets:
            socket.close()
        self._sockets = []

    def _run(self, verb: Verb[R]) -> R:
        assert threading.get_ident() == self._thread, "a QueueClient belongs to the thread that made it"
        if not self._sockets:
            raise QueueClosed("this client has been closed")
        asked: list[int] = []
        answer: Answer | None = None
        try:
            while True:
                step = verb.send(answer)
                answer = None
                if isinstance(step, Send):
                    asked.append(step.request.id)
                    self._asked[step.request.id] = step
                    self._send([step])
                else:
                    answer = self._hear(step)
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

    def _hear(self, hear: Hear) -> Answer:
        give_up_s = time.monotonic() + hear.timeout_s
        while True:
            for number in hear.ids:
                if number in self._answers:
                    del self._asked[number]
                    return self._answers.pop(number)
            left_s = give_up_s - time.monotonic()
            if left_s <= 0:
                raise _timeout(self._verbs, [self._asked[number] for number in hear.ids], hear.timeout_s)
            for socket, _ in self._poller.poll(int(left_s * 1000) + 1):
                answer = answer_of(socket.recv_multipart(copy=False))
                if answer.id in self._asked:
                    self._answers[answer.id] = answer
                else:
                    self._send(self._verbs.handle_stray(answer))


class AsyncQueueClient:
    """The same verbs, awaited. Used from one event loop; any number of verbs may be under way at once."""

    def __init__(
        self, endpoints: str | Sequence[str], *, secret: str = "", timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> None:
        self._verbs = Verbs([endpoints] if isinstance(endpoints, str) else endpoints, timeout_s)
        context = zmq.asyncio.Context.shadow(zmq.Context.instance())
        self._sockets = _connect(context, self._verbs.endpoints, secret)
        self._asked: dict[int, Send] = {}
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
        return await self._run(self._verbs.put(keys, columns, versions))

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

    async def drop(self, keys: Sequence[RowKey], reason: str) -> int:
        return await self._run(self._verbs.drop(keys, reason))

    async def producer_lost(self, producer: str) -> int:
        return await self._run(self._verbs.producer_lost(producer))

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

    async def _run(self, verb: Verb[R]) -> R:
        if not self._sockets:
            raise QueueClosed("this client has been closed")
        if not self._readers:
            self._readers = [asyncio.create_task(self._read(socket)) for socket in self._sockets]
        asked: list[int] = []
        answer: Answer | None = None
        try:
            while True:
                step = verb.send(answer)
                answer = None
                if isinstance(step, Send):
                    asked.append(step.request.id)
                    self._asked[step.request.id] = step
                    self._answers[step.request.id] = asyncio.get_running_loop().create_future()
                    await self._sockets[step.endpoint].send_multipart(frames_of(step), copy=False)
                else:
                    answer = await self._hear(step)
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

    async def _hear(self, hear: Hear) -> Answer:
        futures = [self._answers[number] for number in hear.ids]
        done, _ = await asyncio.wait(futures, timeout=hear.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if not done:
            raise _timeout(self._verbs, [self._asked[number] for number in hear.ids], hear.timeout_s)
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
    if not isinstance(request, wire.Put):
        return [wire.encode(request)]
    headers, frames = wire.pack(step.columns)
    return [wire.encode(wire.Put(request.id, request.keys, headers, request.versions)), *frames]


def answer_of(frames: Sequence[zmq.Frame]) -> Answer:
    reply = wire.decode_reply(frames[0].buffer)
    columns: dict[str, Column] = {}
    if isinstance(reply, wire.Delivered) and reply.keys:
        columns = wire.unpack(reply.columns, [frame.buffer for frame in frames[1:]], len(reply.keys))
    return Answer(reply.id, reply, columns)


def _timeout(verbs: Verbs, unheard: Sequence[Send], timeout_s: float) -> QueueTimeout:
    names = ", ".join(f"{verbs.endpoints[step.endpoint]} ({type(step.request).__name__.lower()})" for step in unheard)
    return QueueTimeout(f"no answer from {names} in {timeout_s:.1f} s")


def _connect(context: Any, endpoints: Sequence[str], secret: str) -> list[Any]:
    for endpoint in endpoints:
        check_endpoint(endpoint, secret)
    sockets = []
    for endpoint in endpoints:
        socket = context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
        socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
        if secret and endpoint.startswith("tcp://"):
            secure_client(socket, secret)
        socket.connect(endpoint)
        sockets.append(socket)
    return sockets
