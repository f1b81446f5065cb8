"""Whose turn it is at a device that a trainer rank shares with an engine (colocated and hybrid placements).

    rank:    batch is whole -> asks -> has all its devices -> trains, publishes -> gives them on
    engine:  is asked -> pauses, frees its memory -> gives the device on -> has it again -> loads, resumes

A run begins with the turn of the ranks, which have weights to publish. Both sides are of one node and speak by
announcements, of which the last is retained: an engine that was started anew learns where things stand, and speaks for
its predecessor. Whoever has a device says so in the event log, and what memory it held, and kept, when it gave it on.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from controllers.context import WorkerContext
from controllers.eventlog import EventLog
from flowrl.memory import give_back, held_mb

SHARING = "sharing"
"""In a worker's payload: worker -> the workers that share a device with it."""
_LOOK_S = 0.2


class Account:
    """Of one worker's turns, in the event log."""

    def __init__(self, context: WorkerContext, events: EventLog) -> None:
        self._device = context.device
        self._fields: dict[str, Any] = {"worker": context.name, "devices": list(context.devices)}
        self._events = events

    def begins(self) -> None:
        self._events.write("device", **self._fields, has=True)

    def ends(self, before_mb: float | None) -> None:
        """Memory that has been freed goes back first. In the file when this returns: others go on then."""
        give_back(self._device)
        self._events.write("device", **self._fields, has=False, held_mb=before_mb, kept_mb=held_mb(self._device))
        self._events.flush()

    def held_mb(self) -> float | None:
        return held_mb(self._device)


class RankTurn:
    """Of a trainer rank. Without engines at its devices it has them always, and nothing here does anything. Used from
    one thread; `give` first, at the end of the turn that a run begins with."""

    def __init__(self, context: WorkerContext, events: EventLog) -> None:
        self._engines: Sequence[str] = context.payload[SHARING].get(context.name, ())
        self._context = context
        self._account = Account(context, events)
        self._number = 0
        self._given: dict[str, int] = dict.fromkeys(self._engines, 0)
        self._changed = threading.Condition()
        for engine in self._engines:
            context.on(_given_topic(engine), partial(self._hear, engine))
        if self.is_shared:
            self._account.begins()

    @property
    def is_shared(self) -> bool:
        return bool(self._engines)

    def take(self) -> bool:
        """Waits until no engine has a device of this rank's. False if the worker is to end instead."""
        if not self.is_shared:
            return True
        self._number += 1
        self._say(asks=True, version=-1)
        with self._changed:
            while missing := [engine for engine, number in self._given.items() if number < self._number]:
                with self._context.waiting_for(f"{', '.join(missing)} to give {', '.join(self._context.devices)}"):
                    self._changed.wait(_LOOK_S)
                if self._context.stopping.is_set():
                    return False
        self._account.begins()
        return True

    def give(self, version: int) -> None:
        """version: the newest that this rank has published."""
        if self.is_shared:
            self._account.ends(self._account.held_mb())
            self._say(asks=False, version=version)

    def _say(self, *, asks: bool, version: int) -> None:
        news = {"number": self._number, "asks": asks, "version": version}
        self._context.announce(_asked_topic(self._context.name), news, everywhere=False)

    def _hear(self, engine: str, news: dict[str, Any]) -> None:
        """In the control thread."""
        with self._changed:
            self._given[engine] = news["numbers"].get(self._context.name, 0)
            self._changed.notify_all()


class EngineTurn:
    """Of an engine, which does not have its device at first. Used from one asyncio loop."""

    def __init__(self, context: WorkerContext, events: EventLog) -> None:
        self._ranks: Sequence[str] = context.payload[SHARING].get(context.name, ())
        self._context = context
        self._account = Account(context, events)
        self._numbers: dict[str, int] = {}
        self._asking = set(self._ranks)
        self._version = -1
        self._is_mine = False
        self._before_mb: float | None = None
        self._changed = asyncio.Event()

    @property
    def is_shared(self) -> bool:
        return bool(self._ranks)

    def listen(self) -> None:
        """Call it once, in the loop."""
        loop = asyncio.get_running_loop()
        if self.is_shared:
            self._account.ends(None)  # a predecessor may have died in its turn

        def hear(rank: str, news: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self._hear, rank, news)

        for rank in self._ranks:
            self._context.on(_asked_topic(rank), partial(hear, rank))

    async def begin(self) -> int:
        """Waits until no rank has the device; the version that they have published."""
        if self.is_shared:
            with self._context.waiting_for(f"{', '.join(self._ranks)} to train"):
                await self._wait(is_asked=False)
            self._is_mine = True
            self._account.begins()
        return self._version

    async def asked(self) -> None:
        """Waits until a rank wants the device."""
        await self._wait(is_asked=True)
        self._before_mb = self._account.held_mb()

    def give(self) -> None:
        """Nothing computes any more, and memory has been freed."""
        self._account.ends(self._before_mb)
        self._is_mine = False
        self._answer()

    async def _wait(self, *, is_asked: bool) -> None:
        while bool(self._asking) is not is_asked:
            self._changed.clear()
            await self._changed.wait()

    def _hear(self, rank: str, news: dict[str, Any]) -> None:
        self._numbers[rank] = news["number"]
        if news["asks"]:
            self._asking.add(rank)
        else:
            self._asking.discard(rank)
            self._version = max(self._version, news["version"])
        self._changed.set()
        if not self._is_mine:
            self._answer()

    def _answer(self) -> None:
        self._context.announce(_given_topic(self._context.name), {"numbers": self._numbers}, everywhere=False)


def _asked_topic(rank: str) -> str:
    return f"device/asked/{rank}"


def _given_topic(engine: str) -> str:
    return f"device/given/{engine}"
