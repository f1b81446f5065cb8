"""What a client says, without a socket: each verb is a generator that yields what to send and whom to hear.

It yields `Send(endpoint, request, columns)` to have a request sent (and gets None), or `Hear(ids, timeout_s)` to wait
for the reply to any of these requests (and gets it). `client.py` drives the generators with a blocking and with an
asyncio socket. This file also knows which shard owns a row, and what to do about an answer that came too late.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

from transfer_queue import wire
from transfer_queue.errors import QueueError, error_named
from transfer_queue.rows import Column, RowKey, Rows

R = TypeVar("R")


class Taken(NamedTuple):
    """rows: none if the wait was in vain. closed: the update is full, and no more rows will come for it."""

    rows: Rows
    closed: bool


class Answer(NamedTuple):
    """A reply with the columns that came with it."""

    id: int
    reply: wire.Reply
    columns: dict[str, Column]


@dataclass(frozen=True)
class Send:
    endpoint: int
    request: wire.Message
    columns: Mapping[str, Column]


@dataclass(frozen=True)
class Hear:
    """The first answer to any of these requests; by then at the latest, or QueueTimeout."""

    ids: tuple[int, ...]
    timeout_s: float


Verb = Generator[Send | Hear, Answer | None, R]


class Verbs:
    """endpoints: the local shard first. timeout_s: how long a shard may take for what needs no waiting."""

    def __init__(self, endpoints: Sequence[str], timeout_s: float) -> None:
        if not endpoints:
            raise ValueError("endpoints: empty; a client speaks with at least one shard")
        self.endpoints = list(endpoints)
        self.timeout_s = timeout_s
        self._ids = itertools.count(1)
        self._stride = 0
        self._owners: dict[int, int] = {}
        self._abandoned: dict[int, Send] = {}

    def announce(self, producer: str, version: int) -> Verb[None]:
        yield from self._ask_all(lambda number: wire.Announce(number, producer, version))

    def reserve(
        self, producer: str, num_groups: int, group_size: int, partition: str, row_bytes: int, wait_s: float
    ) -> Verb[list[wire.Reservation]]:
        request = wire.Reserve(next(self._ids), producer, num_groups, group_size, partition, row_bytes, wait_s)
        answer = yield from self._ask(0, request, wait_s=wait_s)
        assert isinstance(answer.reply, wire.Reserved), f"a reservation was answered by {answer.reply}"
        return answer.reply.groups

    def put(self, keys: Sequence[RowKey], columns: Mapping[str, Column], versions: Sequence[int] | None) -> Verb[int]:
        rows = Rows(keys, columns, versions if versions is not None else ())
        if versions is not None and len(versions) != len(keys):
            raise ValueError(f"versions: {len(versions)} for {len(keys)} rows; one a row")
        accepted = 0
        for owner, positions in (yield from self._by_owner(keys)).items():
            part = rows if len(positions) == len(keys) else rows.select(positions)
            request = wire.Put(next(self._ids), part.keys, [], [int(version) for version in part.versions])
            accepted += _count((yield from self._ask(owner, request, part.columns)))
        return accepted

    def take(
        self,
        consumer: str,
        max_rows: int,
        budget: tuple[str, int] | None,
        update: int | None,
        incarnation: int,
        wait_s: float,
    ) -> Verb[Taken]:
        """The local shard if it has any; otherwise all shards at once, and the first that has some ends the wait."""
        many = len(self.endpoints) > 1

        def request(patience_s: float) -> wire.Take:
            return wire.Take(next(self._ids), consumer, max_rows, budget, update, incarnation, patience_s)

        answer = yield from self._ask(0, request(0.0 if many else wait_s), wait_s=0.0 if many else wait_s)
        answers = [answer]
        if many and (_is_closed(answer) or not _num_rows(answer)):
            if _is_closed(answer):
                wait_s = 0.0
            answers += yield from self._race([request(wait_s) for _ in self.endpoints], wait_s)
        return _merge(answers)

    def ack(self, consumer: str, keys: Sequence[RowKey]) -> Verb[int]:
        count = 0
        for owner, positions in (yield from self._by_owner(keys)).items():
            request = wire.Ack(next(self._ids), consumer, [keys[position] for position in positions])
            count += _count((yield from self._ask(owner, request)))
        return count

    def commit(self, incarnation: int, update: int, keys: Sequence[RowKey]) -> Verb[int]:
        count = 0
        for owner, positions in (yield from self._by_owner(keys)).items():
            request = wire.Commit(next(self._ids), incarnation, update, [keys[position] for position in positions])
            count += _count((yield from self._ask(owner, request)))
        return count

    def drop(self, keys: Sequence[RowKey], reason: str) -> Verb[int]:
        count = 0
        for owner, positions in (yield from self._by_owner(keys)).items():
            request = wire.Drop(next(self._ids), [keys[position] for position in positions], reason)
            count += _count((yield from self._ask(owner, request)))
        return count

    def producer_lost(self, producer: str) -> Verb[int]:
        answers = yield from self._ask_all(lambda number: wire.ProducerLost(number, producer))
        return sum(_count(answer) for answer in answers)

    def introspect(self) -> Verb[dict[str, Any]]:
        """By endpoint."""
        answers = yield from self._ask_all(wire.Introspect)
        reports = {}
        for endpoint, answer in zip(self.endpoints, answers, strict=True):
            assert isinstance(answer.reply, wire.Report), f"an inspection was answered by {answer.reply}"
            reports[endpoint] = answer.reply.state
        return reports

    # Asking

    def _ask(
        self, endpoint: int, request: wire.Message, columns: Mapping[str, Column] | None = None, wait_s: float = 0.0
    ) -> Verb[Answer]:
        yield Send(endpoint, request, columns or {})
        answer = yield Hear((request.id,), wait_s + self.timeout_s)
        assert answer is not None, "who drives a verb answers a Hear"
        if isinstance(answer.reply, wire.Refused):
            raise error_named(answer.reply.error, f"{answer.reply.message} (by {self.endpoints[endpoint]})")
        return answer

    def _ask_all(self, make: Any) -> Verb[list[Answer]]:
        answers = []
        for endpoint in range(len(self.endpoints)):
            answers.append((yield from self._ask(endpoint, make(next(self._ids)))))
        return answers

    def _race(self, requests: Sequence[wire.Message], wait_s: float) -> Verb[list[Answer]]:
        """One request to each shard. When one has rows, or says that it is over, the others are told to stop waiting;
        they may have rows too by then, and those are taken along."""
        waiting = {request.id: endpoint for endpoint, request in enumerate(requests)}
        for endpoint, request in enumerate(requests):
            yield Send(endpoint, request, {})
        answers: list[Answer] = []
        failure: QueueError | None = None
        is_over = False
        while waiting:
            answer = yield Hear(tuple(waiting), wait_s + self.timeout_s)
            assert answer is not None, "who drives a verb answers a Hear"
            endpoint = waiting.pop(answer.id)
            if isinstance(answer.reply, wire.Refused):
                message = f"{answer.reply.message} (by {self.endpoints[endpoint]})"
                failure = error_named(answer.reply.error, message)
            else:
                answers.append(answer)
            if not is_over and (failure is not None or _num_rows(answer) or _is_closed(answer)):
                is_over = True
                for target, other in waiting.items():
                    yield Send(other, wire.Cancel(next(self._ids), target), {})
        if failure is not None and not any(_num_rows(answer) for answer in answers):
            raise failure
        return answers

    # Giving up

    def abandon(self, step: Send, answer: Answer | None) -> list[Send]:
        """The verb has ended without hearing this answer: what to tell the shard, so that nothing is given to
        nobody."""
        if not isinstance(step.request, wire.Take | wire.Reserve):
            return []
        if answer is not None:
            return self._decline(step, answer)
        self._abandoned[step.request.id] = step
        return [Send(step.endpoint, wire.Cancel(next(self._ids), step.request.id), {})]

    def handle_stray(self, answer: Answer) -> list[Send]:
        """An answer for which nobody waits."""
        step = self._abandoned.pop(answer.id, None)
        return self._decline(step, answer) if step is not None else []

    def _decline(self, step: Send, answer: Answer) -> list[Send]:
        consumer = ""
        keys: list[RowKey] = []
        if isinstance(answer.reply, wire.Delivered) and isinstance(step.request, wire.Take):
            consumer, keys = step.request.consumer, answer.reply.keys
        elif isinstance(answer.reply, wire.Reserved):
            keys = [key for group in answer.reply.groups for key in group.keys]
        return [Send(step.endpoint, wire.Decline(next(self._ids), consumer, keys), {})] if keys else []

    # Which shard

    def _by_owner(self, keys: Sequence[RowKey]) -> Verb[dict[int, list[int]]]:
        """Positions of the keys by the endpoint that owns them: shards number their groups in strides."""
        if len(self.endpoints) == 1:
            return {0: list(range(len(keys)))} if keys else {}
        if not self._stride:
            for endpoint, answer in enumerate((yield from self._ask_all(wire.Locate))):
                assert isinstance(answer.reply, wire.Located), f"a location was answered by {answer.reply}"
                self._stride = answer.reply.group_stride
                self._owners[answer.reply.first_group % self._stride] = endpoint
        positions: dict[int, list[int]] = {}
        for position, key in enumerate(keys):
            owner = self._owners.get(key.group % self._stride)
            if owner is None:
                raise ValueError(f"keys: {key}; none of {self.endpoints} owns that group")
            positions.setdefault(owner, []).append(position)
        return positions


def _count(answer: Answer) -> int:
    assert isinstance(answer.reply, wire.Done), f"answered by {answer.reply}"
    return answer.reply.count


def _num_rows(answer: Answer) -> int:
    return len(answer.reply.keys) if isinstance(answer.reply, wire.Delivered) else 0


def _is_closed(answer: Answer) -> bool:
    return isinstance(answer.reply, wire.Delivered) and answer.reply.closed


def _merge(answers: Sequence[Answer]) -> Taken:
    """The rows of several shards in one. Where only some have an optional column, the rows of others have length 0."""
    parts = [
        Rows(answer.reply.keys, answer.columns, answer.reply.versions)
        for answer in answers
        if isinstance(answer.reply, wire.Delivered) and answer.reply.keys
    ]
    closed = any(_is_closed(answer) for answer in answers)
    if len(parts) < 2:
        return Taken(parts[0] if parts else Rows([], {}), closed)
    known = {name: column for part in parts for name, column in part.columns.items()}
    for part in parts:
        for name, column in known.items():
            if name not in part:
                part.columns[name] = Column.empty_rows(len(part), column.values.dtype)
    return Taken(Rows.concatenate(parts), closed)
