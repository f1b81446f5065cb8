"""What a verb says and hears: the steps that a client carries out for it, the answers it gets, and what they hold."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from transfer_queue import wire
from transfer_queue.rows import Column, Rows
from transfer_queue.spans import Span

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


def count_of(answer: Answer) -> int:
    assert isinstance(answer.reply, wire.Done), f"answered by {answer.reply}"
    return answer.reply.count


def spans_in(answer: Answer) -> list[Span]:
    assert isinstance(answer.reply, wire.Delivered), f"a take was answered by {answer.reply}"
    return answer.reply.spans


def num_rows(answer: Answer) -> int:
    return len(answer.reply.spans) if isinstance(answer.reply, wire.Delivered) else 0


def is_closed(answer: Answer) -> bool:
    return isinstance(answer.reply, wire.Delivered) and answer.reply.closed


def merge(answers: Sequence[Answer]) -> Taken:
    """The rows of several shards in one."""
    parts = [
        Rows(answer.reply.keys, answer.columns, answer.reply.versions)
        for answer in answers
        if isinstance(answer.reply, wire.Delivered) and answer.reply.spans
    ]
    closed = any(is_closed(answer) for answer in answers)
    if len(parts) < 2:
        return Taken(parts[0] if parts else Rows([], {}), closed)
    return Taken(Rows.concatenate(parts), closed)
