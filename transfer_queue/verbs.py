"""What a client says, without a socket: each verb is a generator that yields what to send and whom to hear.

It yields `Send(endpoint, request, columns)` to have a request sent (and gets None), or `Hear(ids, timeout_s)` to wait
for the reply to any of these requests (and gets it; `steps.py`). `client.py` drives the generators with a blocking
socket, `async_client.py` with an asyncio one. This file also knows which shard owns a row, and what to do about an
answer that came too late.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transfer_queue import wire
from transfer_queue.buffers import Buffers
from transfer_queue.errors import QueueError, QueueTimeout, RowRefused, WireError, error_named
from transfer_queue.frames import check_put_bytes
from transfer_queue.gathering import Part, batches, join
from transfer_queue.narrow import narrowed, widened
from transfer_queue.near import Near
from transfer_queue.rows import RowKey
from transfer_queue.segments import SharedSpace
from transfer_queue.spans import Span, spans_of
from transfer_queue.steps import Answer, Hear, Send, Taken, Verb, count_of, is_closed, merge, num_rows, spans_in

CANCEL_S = 2.0
"""How long a take that has its rows waits for shards that it has told to stop waiting."""


class Verbs:
    """endpoints: the local shard first. timeout_s: how long a shard may take for what needs no waiting. A client knows
    a shard from its first answer to `Locate` on: which groups are its own, and whether its memory can be shared."""

    def __init__(self, endpoints: Sequence[str], timeout_s: float, shares_memory: bool) -> None:
        if not endpoints:
            raise ValueError("endpoints: empty; a client speaks with at least one shard")
        self.endpoints = list(endpoints)
        self.timeout_s = timeout_s
        self._shares_memory = shares_memory
        self._ids = itertools.count(1)
        self._stride = 0
        self._owners: dict[int, int] = {}
        self._near: dict[int, Near] = {}
        self._buffers = Buffers()
        self._held: tuple[tuple[int, int], set[Span]] = ((-1, -1), set())
        self._max_put_bytes: dict[int, int] = {}
        self._abandoned: dict[int, Send] = {}

    def close(self) -> None:
        for near in self._near.values():
            near.close()
        self._near.clear()

    def announce(self, producer: str, version: int) -> Verb[None]:
        yield from self._ask_all(lambda number: wire.Announce(number, producer, version))

    def reserve(
        self, producer: str, num_groups: int, group_size: int, partition: str, row_bytes: int, wait_s: float
    ) -> Verb[list[wire.Reservation]]:
        request = wire.Reserve(next(self._ids), producer, num_groups, group_size, partition, row_bytes, wait_s)
        answer = yield from self._ask(0, request, wait_s=wait_s)
        assert isinstance(answer.reply, wire.Reserved), f"a reservation was answered by {answer.reply}"
        return answer.reply.groups

    def put(self, parts: Sequence[Part]) -> Verb[Sequence[int | QueueError]]:
        """For each part how many of its rows are still wanted, or why the shard refused it."""
        outcomes: list[int | QueueError] = []
        for positions in batches(parts):
            together = [parts[position] for position in positions]
            try:
                unwanted = yield from self._put(join(together))
            except (RowRefused, WireError) as error:
                if len(together) == 1:
                    outcomes.append(error)
                    continue
                for part in together:
                    outcomes += yield from self.put([part])
                continue
            first = 0
            for part in together:
                end = first + len(part.keys)
                outcomes.append(len(part.keys) - sum(first <= position < end for position in unwanted))
                first = end
        return outcomes

    def _put(self, part: Part) -> Verb[list[int]]:
        """Positions of the rows that nobody wants any more."""
        yield from self.locate()
        owned = self._by_owner(part.keys) if len(self.endpoints) > 1 else {0: range(len(part.keys))}
        mine = {owner: part.select(positions) for owner, positions in owned.items()}
        for owner, share in mine.items():
            check_put_bytes(share.num_bytes, self._max_put_bytes[owner])
        answers = yield from self._ask_each([self._put_to(owner, share) for owner, share in mine.items()])
        unwanted: list[int] = []
        for positions, answer in zip(owned.values(), answers, strict=True):
            assert isinstance(answer.reply, wire.Stored), f"a put was answered by {answer.reply}"
            unwanted += [positions[position] for position in answer.reply.unwanted]
        return unwanted

    def _put_to(self, owner: int, part: Part) -> Send:
        """Written into the shard's memory, if that is near."""
        near = self._near.get(owner)
        versions = [int(version) for version in part.versions]
        placed, columns = None, {}
        if near is not None:
            placed = near.write(part.columns, len(part.keys))
        else:
            columns = {name: narrowed(column) for name, column in part.columns.items()}
        return Send(owner, wire.Put(next(self._ids), spans_of(part.keys), [], versions, placed), columns)

    def take(
        self,
        consumer: str,
        max_rows: int,
        budget: tuple[str, int] | None,
        update: int | None,
        incarnation: int,
        wait_s: float,
        done: Sequence[RowKey],
    ) -> Verb[Taken]:
        """The local shard if it has any; otherwise all shards at once, and the first that has some ends the wait."""
        finished = yield from self._spans_by_owner(done)
        mine = finished.pop(0, [])
        yield from self._ask_each(
            [Send(at, wire.Ack(next(self._ids), consumer, got), {}) for at, got in finished.items()]
        )
        many = len(self.endpoints) > 1

        def request(endpoint: int, patience_s: float, done: list[Span]) -> wire.Take:
            return wire.Take(
                next(self._ids),
                consumer,
                max_rows,
                budget,
                update,
                incarnation,
                patience_s,
                endpoint in self._near,
                done,
            )

        while True:
            patience_s = 0.0 if many else wait_s
            first = yield from self._ask(0, request(0, patience_s, mine), wait_s=patience_s)
            mine = []
            answers = {0: [first]}
            if many and (is_closed(first) or not num_rows(first)):
                if is_closed(first):
                    wait_s = 0.0
                asked = [request(endpoint, wait_s, []) for endpoint in range(len(self.endpoints))]
                for endpoint, answer in (yield from self._race(asked, wait_s)):
                    answers.setdefault(endpoint, []).append(answer)
            whole = []
            for endpoint, given in answers.items():
                for answer in given:
                    read = self._read(endpoint, answer)
                    if read is None:
                        yield Send(endpoint, wire.Decline(next(self._ids), consumer, spans_in(answer)), {})
                    else:
                        whole.append(read)
            if whole:
                taken = merge(whole)
                return taken if update is None else self._without_held(taken, (incarnation, update))

    def _without_held(self, taken: Taken, update: tuple[int, int]) -> Taken:
        """A shard that has come back from its journal cannot know whether its last answer arrived, and repeats it."""
        if self._held[0] != update:
            self._held = (update, set())
        held, given = self._held[1], spans_of(taken.rows.keys)
        if held.isdisjoint(given):
            held.update(given)
            return taken
        known = {key for span in held.intersection(given) for key in span.keys}
        held.update(given)
        fresh = [position for position, key in enumerate(taken.rows.keys) if key not in known]
        return Taken(taken.rows.select(fresh), taken.closed)

    def _read(self, endpoint: int, answer: Answer) -> Answer | None:
        """With its columns as they were put, out of shared memory or out of the answer; None if they were moved before
        they could be copied."""
        if not isinstance(answer.reply, wire.Delivered) or not answer.reply.placed:
            columns = {name: widened(column, self._buffers.take) for name, column in answer.columns.items()}
            return answer._replace(columns=columns)
        read = self._near[endpoint].reader.read(answer.reply)
        return None if read is None else answer._replace(columns=read)

    def ack(self, consumer: str, keys: Sequence[RowKey]) -> Verb[int]:
        return (yield from self._count_each(keys, lambda number, spans: wire.Ack(number, consumer, spans)))

    def commit(self, incarnation: int, update: int, keys: Sequence[RowKey]) -> Verb[int]:
        return (
            yield from self._count_each(keys, lambda number, spans: wire.Commit(number, incarnation, update, spans))
        )

    def close_update(self, incarnation: int, update: int) -> Verb[None]:
        yield from self._ask(0, wire.CloseUpdate(next(self._ids), incarnation, update))

    def begin(self, incarnation: int, version: int, lost: Sequence[str]) -> Verb[None]:
        yield from self._ask(0, wire.Begin(next(self._ids), incarnation, version, list(lost)))

    def drop(self, keys: Sequence[RowKey], reason: str, again: bool) -> Verb[int]:
        return (yield from self._count_each(keys, lambda number, spans: wire.Drop(number, spans, reason, again)))

    def producer_lost(self, producer: str) -> Verb[int]:
        answers = yield from self._ask_all(lambda number: wire.ProducerLost(number, producer))
        return sum(count_of(answer) for answer in answers)

    def consumer_lost(self, client: str) -> Verb[int]:
        answers = yield from self._ask_all(lambda number: wire.ConsumerLost(number, client))
        return sum(count_of(answer) for answer in answers)

    def save(self, directory: str, with_rows: bool) -> Verb[int]:
        answers = yield from self._ask_all(lambda number: wire.Save(number, directory, with_rows))
        return sum(count_of(answer) for answer in answers)

    def introspect(self) -> Verb[dict[str, Any]]:
        """By endpoint."""
        answers = yield from self._ask_all(wire.Introspect)
        reports = {}
        for endpoint, answer in zip(self.endpoints, answers, strict=True):
            assert isinstance(answer.reply, wire.Report), f"an inspection was answered by {answer.reply}"
            reports[endpoint] = answer.reply.state
        return reports

    # Asking

    def _ask(self, endpoint: int, request: wire.Message, wait_s: float = 0.0) -> Verb[Answer]:
        (answer,) = yield from self._ask_each([Send(endpoint, request, {})], wait_s)
        return answer

    def _ask_all(self, make: Callable[[int], wire.Message]) -> Verb[list[Answer]]:
        """Every shard; make: a request of that id."""
        sends = [Send(endpoint, make(next(self._ids)), {}) for endpoint in range(len(self.endpoints))]
        return (yield from self._ask_each(sends))

    def _count_each(self, keys: Sequence[RowKey], make: Callable[[int, list[Span]], wire.Message]) -> Verb[int]:
        """Asks the owners of the keys, and adds up."""
        spans = yield from self._spans_by_owner(keys)
        sends = [Send(owner, make(next(self._ids), mine), {}) for owner, mine in spans.items()]
        return sum(count_of(answer) for answer in (yield from self._ask_each(sends)))

    def _ask_each(self, sends: Sequence[Send], wait_s: float = 0.0) -> Verb[list[Answer]]:
        """All are asked before any is heard, and all are heard before the first refusal is raised."""
        for send in sends:
            yield send
        answers = []
        failure: QueueError | None = None
        for send in sends:
            answer = yield Hear((send.request.id,), wait_s + self.timeout_s)
            assert answer is not None, "who drives a verb answers a Hear"
            answers.append(answer)
            if failure is None and isinstance(answer.reply, wire.Refused):
                failure = self._failure(send.endpoint, answer.reply)
            elif send.endpoint in self._near and isinstance(answer.reply, wire.Stored):
                self._near[send.endpoint].writer.recycle(answer.reply.recycled)
        if failure is not None:
            raise failure
        return answers

    def _failure(self, endpoint: int, reply: wire.Refused) -> QueueError:
        return error_named(reply.error, f"{reply.message} (by {self.endpoints[endpoint]})")

    def _race(self, requests: Sequence[wire.Message], wait_s: float) -> Verb[list[tuple[int, Answer]]]:
        """One request to each shard. When one has rows, or says that it is over, the others are told to stop waiting;
        they may have rows too by then, and those are taken along. One that is silent then keeps nobody waiting: what it
        says later is sent back."""
        waiting = {request.id: endpoint for endpoint, request in enumerate(requests)}
        for endpoint, request in enumerate(requests):
            yield Send(endpoint, request, {})
        answers: list[tuple[int, Answer]] = []
        failure: QueueError | None = None
        is_over = False
        while waiting:
            try:
                answer = yield Hear(tuple(waiting), CANCEL_S if is_over else wait_s + self.timeout_s)
            except QueueTimeout:
                if is_over:
                    break
                raise
            assert answer is not None, "who drives a verb answers a Hear"
            endpoint = waiting.pop(answer.id)
            if isinstance(answer.reply, wire.Refused):
                failure = self._failure(endpoint, answer.reply)
            else:
                answers.append((endpoint, answer))
            if not is_over and (failure is not None or num_rows(answer) or is_closed(answer)):
                is_over = True
                for target, other in waiting.items():
                    yield Send(other, wire.Cancel(next(self._ids), target), {})
        if failure is not None and not any(num_rows(answer) for _, answer in answers):
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
        spans: list[Span] = []
        if isinstance(answer.reply, wire.Delivered) and isinstance(step.request, wire.Take):
            consumer, spans = step.request.consumer, answer.reply.spans
        elif isinstance(answer.reply, wire.Reserved):
            spans = [group.span for group in answer.reply.groups]
        return [Send(step.endpoint, wire.Decline(next(self._ids), consumer, spans), {})] if spans else []

    # Which shard

    @property
    def has_located(self) -> bool:
        return self._stride > 0

    def locate(self) -> Verb[None]:
        """Once: what there is to know of the shards. Most verbs begin with it."""
        if self.has_located:
            return
        for endpoint, answer in enumerate((yield from self._ask_all(wire.Locate))):
            located = answer.reply
            assert isinstance(located, wire.Located), f"a location was answered by {located}"
            self._stride = located.group_stride
            self._owners[located.first_group % self._stride] = endpoint
            self._max_put_bytes[endpoint] = located.max_put_bytes
            space = SharedSpace.visit(located.segments, located.token) if self._shares_memory else None
            if space is not None:
                self._near[endpoint] = Near(space, located.writer)

    def _spans_by_owner(self, keys: Sequence[RowKey]) -> Verb[dict[int, list[Span]]]:
        yield from self.locate()
        spans: dict[int, list[Span]] = {}
        for span in spans_of(keys):
            spans.setdefault(self._owner(span.group), []).append(span)
        return spans

    def _owner(self, group: int) -> int:
        """The endpoint: shards number their groups in strides."""
        owner = self._owners.get(group % self._stride) if len(self.endpoints) > 1 else 0
        if owner is None:
            raise ValueError(f"keys: group {group}; none of {self.endpoints} owns it")
        return owner

    def _by_owner(self, keys: Sequence[RowKey]) -> Mapping[int, Sequence[int]]:
        """Positions of the keys by the endpoint that owns them."""
        positions: dict[int, list[int]] = {}
        for position, key in enumerate(keys):
            positions.setdefault(self._owner(key.group), []).append(position)
        return positions
