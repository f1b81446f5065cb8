"""Engines in virtual time, for benchmarks: one machine has too few cores for eight of them.

All requests of an engine advance by a token a step, and a step takes longer the more there are. Whatever else runs in
the loop is the code under test; where the loop would sleep, its clock jumps.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import selectors
from collections.abc import Callable
from typing import Any

PLACES = 16
PREFILL_TOKENS_S = 10_000.0


def step_s(num_running: int) -> float:
    """A decode step reads the weights once, 12 ms, and each request's keys, 0.1 ms."""
    return 0.012 + 0.0001 * num_running


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing is waited for."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        return self._now_s

    def jump(self, seconds: float) -> None:
        self._now_s += seconds


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> Any:
        assert timeout is not None, "everybody waits, and nothing will happen"
        if timeout > 0:
            self._loop.jump(timeout)
        return super().select(0)


class VirtualEngine:
    """Everybody who runs advances equally, so one counter of steps serves all, and one timer: for whoever is next.

    num_here: requests that run or wait for a place. on_empty is called when the last of them leaves."""

    def __init__(self, on_empty: Callable[[], None] = lambda: None) -> None:
        self.steps = 0.0
        self.num_here = 0
        self._on_empty = on_empty
        self._goals: list[tuple[float, int, asyncio.Future[int]]] = []
        self._begun: dict[asyncio.Future[int], float] = {}
        self._ids = itertools.count()
        self._since_s = 0.0
        self._places = asyncio.Semaphore(PLACES)
        self._timer: asyncio.TimerHandle | None = None

    async def generate(self, length: int, begin: Callable[[], None] = lambda: None, context: int = 0) -> int:
        """How many of `length` tokens were made: fewer if it was sent away. begin() is called with the first.
        context: tokens that were made elsewhere and are computed anew."""
        self.num_here += 1
        try:
            async with self._places:
                begin()
                if context:
                    await asyncio.sleep(context / PREFILL_TOKENS_S)
                return await self._decode(length)
        finally:
            self.num_here -= 1
            if not self.num_here:
                self._on_empty()

    def send_away(self) -> None:
        """All that run here end now, with what they have."""
        self._advance()
        for done, start in list(self._begun.items()):
            if not done.done():
                done.set_result(int(self.steps - start))

    @property
    def num_running(self) -> int:
        return len(self._begun)

    async def _decode(self, length: int) -> int:
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._advance()
        self._begun[done] = self.steps
        heapq.heappush(self._goals, (self.steps + length, next(self._ids), done))
        self._set_timer()
        try:
            return min(length, await done)
        finally:
            self._advance()
            del self._begun[done]
            self._set_timer()

    def _advance(self) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._begun:
            self.steps += (now_s - self._since_s) / step_s(len(self._begun))
        self._since_s = now_s

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        while self._goals and self._goals[0][2].done():
            heapq.heappop(self._goals)
        if self._goals and self._begun:
            wait_s = max(0.0, self._goals[0][0] - self.steps) * step_s(len(self._begun))
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._end_next)

    def _end_next(self) -> None:
        self._advance()
        while self._goals and (self._goals[0][2].done() or self._goals[0][0] - self.steps < 1e-6):
            goal, _, done = heapq.heappop(self._goals)
            if not done.done():
                done.set_result(round(goal - self._begun[done]))
        self._set_timer()
