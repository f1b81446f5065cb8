"""What a user may decide: which late groups are dropped, and in which order ready ones are taken. Pure.

A policy is one of ours, by its name, or a function of the user's, by its dotted path (`package.module:function`). It
sees small frozen descriptions and must decide by them alone: shards ask it again whenever something has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transfer_queue.dotted import load_attribute


@dataclass(frozen=True, kw_only=True)
class Blocker:
    """A group that is due and not ready, while a ready one was refused because of it. `num_unready` of its `num_rows`
    still lack a column; age_s: since it was reserved, at this attempt."""

    group: int
    attempt: int
    deadline: int
    num_rows: int
    num_unready: int
    age_s: float


@dataclass(frozen=True, kw_only=True)
class ReadyGroup:
    """A group of which a consumer could have something. version: named at its reservation. arrival: counts what became
    ready on this shard for this consumer before it."""

    partition: str
    group: int
    attempt: int
    version: int
    deadline: int
    num_rows: int
    arrival: int


LatePolicy = Callable[[Sequence[Blocker]], Sequence[Blocker]]
"""Given all blockers of one shard, earliest deadline first: those to be dropped. None means waiting. Dropping one makes
room for one ready group, after which the rest is looked at anew."""
OrderPolicy = Callable[[ReadyGroup], Any]
"""A sort key: the least is taken first."""


def wait(blockers: Sequence[Blocker]) -> Sequence[Blocker]:
    return ()


def drop(blockers: Sequence[Blocker]) -> Sequence[Blocker]:
    return blockers[:1]


def deadline(group: ReadyGroup) -> int:
    """The stalest first, which also leaves the most room for the others."""
    return group.deadline


def freshest(group: ReadyGroup) -> int:
    return -group.deadline


def arrival(group: ReadyGroup) -> int:
    return group.arrival


_LATE: dict[str, LatePolicy] = {"wait": wait, "drop": drop}
_ORDERS: dict[str, OrderPolicy] = {"deadline": deadline, "freshest": freshest, "arrival": arrival}


def late_policy(name: str) -> LatePolicy:
    """Raises ValueError, naming field, value and rule."""
    return _find("late", name, _LATE)


def order_policy(name: str) -> OrderPolicy:
    """Raises ValueError, naming field, value and rule."""
    return _find("order", name, _ORDERS)


def choose_late(policy: LatePolicy, blockers: Sequence[Blocker]) -> list[Blocker]:
    """What the policy drops. Raises ValueError if that is anything but some of the blockers."""
    chosen = list(policy(blockers)) if blockers else []
    strangers = [blocker for blocker in chosen if blocker not in blockers]
    if strangers or len(chosen) != len({(blocker.group, blocker.attempt) for blocker in chosen}):
        raise ValueError(f"late: {_name_of(policy)} returned {chosen}; must be some of the blockers, each once")
    return chosen


def _find(field: str, name: str, ours: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    if name in ours:
        return ours[name]
    if ":" not in name:
        raise ValueError(f"{field}: {name!r}; must be one of {', '.join(ours)}, or read 'package.module:function'")
    try:
        found = load_attribute(name)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    if not callable(found):
        raise ValueError(f"{field}: {name!r} is {found!r}; must be a function")
    return found


def _name_of(policy: LatePolicy) -> str:
    return f"{policy.__module__}:{policy.__qualname__}"
