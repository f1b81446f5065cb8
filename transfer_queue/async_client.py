"""The asyncio face of a client: the verbs of `client.py`, to be awaited."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import zmq
import zmq.asyncio

from transfer_queue import wire
from transfer_queue.errors import QueueClosed, QueueError, QueueTimeout, WireError
from transfer_queue.gathering import GATHER_BYTES, Part, count_or_raise, part_of
from transfer_queue.parts import is_small
from transfer_queue.rows import Column, RowKey
from transfer_queue.sockets import DEFAULT_TIMEOUT_S, DEFAULT_WAIT_S, answer_of, connect, frames_of, timeout_of
from transfer_queue.steps import Answer, Hear, Send, Taken, Verb
from transfer_queue.verbs import Verbs

R = TypeVar("R")


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
        self._sockets = connect(context, self._verbs.endpoints, secret, name)
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
        part = part_of(keys, columns, versions)
        if part.num_bytes > GATHER_BYTES:
            return count_or_raise(await self._run(self._verbs.put([part])))
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
        done: Sequence[RowKey] = (),
    ) -> Taken:
        return await self._run(self._verbs.take(consumer, max_rows, budget, update, incarnation, wait_s, done))

    async def ack(self, consumer: str, keys: Sequence[RowKey]) -> int:
        return await self._run(self._verbs.ack(consumer, keys))

    async def commit(self, incarnation: int, update: int, keys: Sequence[RowKey]) -> int:
        return await self._run(self._verbs.commit(incarnation, update, keys))

    async def close_update(self, incarnation: int, update: int) -> None:
        await self._run(self._verbs.close_update(incarnation, update))

    async def begin(self, incarnation: int, version: int, lost: Sequence[str] = ()) -> None:
        await self._run(self._verbs.begin(incarnation, version, lost))

    async def drop(self, keys: Sequence[RowKey], reason: str, again: bool = False) -> int:
        return await self._run(self._verbs.drop(keys, reason, again))

    async def producer_lost(self, producer: str) -> int:
        return await self._run(self._verbs.producer_lost(producer))

    async def consumer_lost(self, client: str) -> int:
        return await self._run(self._verbs.consumer_lost(client))

    async def save(self, directory: str, with_rows: bool = True) -> int:
        return await self._run(self._verbs.save(directory, with_rows))

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
                    await self._sockets[step.endpoint].send_multipart(*_to_send(step))
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
                self._sockets[step.endpoint].send_multipart(*_to_send(step))

    def _timeout(self, hear: Hear) -> QueueTimeout:
        return timeout_of(self._verbs, [self._asked[number] for number in hear.ids], hear.timeout_s)

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
                answer = answer_of([frame.buffer for frame in frames])
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


def _to_send(step: Send) -> tuple[list[Any], int, bool]:
    """Frames, flags, and whether they are copied."""
    frames = frames_of(step)
    return frames, 0, all(map(is_small, frames))
