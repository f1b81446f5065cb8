"""What each remedy for the long tail of response lengths is worth: seconds to collect a batch, switch by switch.

    python benchmarks/long_tail.py [--batches 12] [--seeds 5] [--out RESULT.json]

Engines here live in virtual time, because one machine has too few cores for eight of them: all requests of an engine
advance by a token a step, and a step takes longer the more there are (`step_s`). What decides who runs where and what
is kept is the production code: the router of `flowrl/rollout/scheduling/routing.py`, `first_to_end` of
`flowrl/rollout/scheduling/groups.py`, run on an asyncio loop whose clock jumps to whatever comes next.

A batch is 64 groups of 8 samples on 8 engines of 16 places. Lengths are log-normal (σ = 1.2, median 400, at most
16,384), half of the variance is the prompt's. Three prompts in ten are tied and must be replaced. A reward takes 2 s,
16 at once. The bound is the work of the samples that were kept, spread evenly over engines that are always full.

    synchronous   a whole batch, then its rewards, then as many groups as were tied, until there are enough
    stream        rewards as responses end, tied groups replaced at once (rollout.filter_tied), staleness.max = 0
    redundancy    10 samples a group, the first 8 kept (rollout.redundancy = 2)
    ahead         groups of the next batches fill free places (staleness.max = 1, 2)
"""

from __future__ import annotations

import argparse
import asyncio
import heapq
import itertools
import json
import selectors
import statistics
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flowrl.rollout.scheduling.groups import first_to_end
from flowrl.rollout.scheduling.routing import Router

NUM_ENGINES = 8
PLACES = 16
GROUPS = 64
GROUP_SIZE = 8
SIGMA = 1.2
MEDIAN = 400
LONGEST = 16384
TIED = 0.3
REWARD_S = 2.0
REWARD_PLACES = 16


@dataclass(frozen=True, kw_only=True)
class Switches:
    """ahead: batches beyond the one that is collected that groups may belong to, -1 for whole rounds."""

    ahead: int = -1
    redundancy: int = 0


CASES = {
    "synchronous": Switches(),
    "synchronous, redundancy": Switches(redundancy=2),
    "stream": Switches(ahead=0),
    "stream, redundancy": Switches(ahead=0, redundancy=2),
    "stream, ahead 1": Switches(ahead=1),
    "stream, ahead 2": Switches(ahead=2),
    "all, ahead 2": Switches(ahead=2, redundancy=2),
}


def main() -> None:
    given = parse()
    rows = []
    for name, switches in CASES.items():
        runs = [simulated(switches, given.batches, seed) for seed in range(given.seeds)]
        rows.append({"switches": name, **{key: round(statistics.mean(run[key] for run in runs), 2) for key in runs[0]}})
        print(rows[-1], flush=True)
    for row in rows:
        row["speed_up"] = round(rows[0]["batch_s"] / row["batch_s"], 2)
    result = {"date": time.strftime("%Y-%m-%d"), "batches": given.batches, "seeds": given.seeds, "cases": rows}
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


def step_s(num_running: int) -> float:
    """A decode step reads the weights once, 12 ms, and each request's keys, 0.1 ms."""
    return 0.012 + 0.0001 * num_running


class VirtualLoop(asyncio.SelectorEventLoop):
    """Nothing is waited for: where the loop would sleep, its clock jumps."""

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
    """Everybody who runs advances equally, so one counter of steps serves all, and one timer: for whoever is next."""

    def __init__(self) -> None:
        self.steps = 0.0
        self._goals: list[tuple[float, int, asyncio.Future[None]]] = []
        self._num_running = 0
        self._ids = itertools.count()
        self._since_s = 0.0
        self._places = asyncio.Semaphore(PLACES)
        self._timer: asyncio.TimerHandle | None = None

    async def generate(self, length: int) -> None:
        async with self._places:
            self._advance(+1)
            done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._goals, (self.steps + length, next(self._ids), done))
            self._set_timer()
            try:
                await done
            finally:
                self._advance(-1)
                self._set_timer()

    def _advance(self, arrivals: int) -> None:
        now_s = asyncio.get_running_loop().time()
        if self._num_running:
            self.steps += (now_s - self._since_s) / step_s(self._num_running)
        self._since_s = now_s
        self._num_running += arrivals

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        while self._goals and self._goals[0][2].done():
            heapq.heappop(self._goals)
        if self._goals and self._num_running:
            wait_s = max(0.0, self._goals[0][0] - self.steps) * step_s(self._num_running)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._end_next)

    def _end_next(self) -> None:
        self._advance(0)
        while self._goals and (self._goals[0][2].done() or self._goals[0][0] - self.steps < 1e-6):
            _, _, done = heapq.heappop(self._goals)
            if not done.done():
                done.set_result(None)
        self._set_timer()


class Collector:
    """Samples groups and says when each batch of untied ones is there."""

    def __init__(self, switches: Switches, seed: int) -> None:
        self.switches = switches
        self.engines = [VirtualEngine() for _ in range(NUM_ENGINES)]
        self.router = Router(NUM_ENGINES)
        self.rewards = asyncio.Semaphore(REWARD_PLACES)
        self.dice = np.random.default_rng(seed)
        self.num_groups = 0
        self.kept: list[int] = []

    async def group(self) -> bool:
        """Whether it is of use."""
        number, self.num_groups = self.num_groups, self.num_groups + 1
        count = GROUP_SIZE + self.switches.redundancy
        spread = np.sqrt(0.5) * (self.dice.normal() + self.dice.normal(size=count))
        lengths = np.clip(MEDIAN * np.exp(SIGMA * spread), 1, LONGEST).astype(int).tolist()
        is_tied = bool(self.dice.random() < TIED)
        kept: list[int] = []
        rewards: list[asyncio.Task[None]] = []

        def accept(place: int, length: int) -> None:
            kept.append(length)
            if self.switches.ahead >= 0:
                rewards.append(asyncio.create_task(self._reward()))

        try:
            await first_to_end([self._sample(number, length) for length in lengths], GROUP_SIZE, accept)
            await asyncio.gather(*rewards)
        finally:
            for reward in rewards:
                reward.cancel()
        if not is_tied:
            self.kept += kept
        return not is_tied

    async def _sample(self, number: int, length: int) -> int:
        server = self.router.choose((number,))
        try:
            await self.engines[server].generate(length)
        finally:
            self.router.leave(server)
        return length

    async def _reward(self) -> None:
        async with self.rewards:
            await asyncio.sleep(REWARD_S)

    async def rounds(self, num_batches: int) -> None:
        for _ in range(num_batches):
            missing = GROUPS
            while missing:
                useful = await asyncio.gather(*(self.group() for _ in range(missing)))
                await asyncio.gather(*(self._reward() for _ in range(missing * GROUP_SIZE)))
                missing -= sum(useful)

    async def stream(self, num_batches: int) -> None:
        """Rule of admission: outstanding + collected <= (ahead + 1) · batch."""
        running: set[asyncio.Task[bool]] = set()
        collected = GROUPS
        for _ in range(num_batches):
            collected -= GROUPS
            while collected < GROUPS:
                room = (self.switches.ahead + 1) * GROUPS - collected - len(running)
                running |= {asyncio.create_task(self.group()) for _ in range(room)}
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                collected += sum(task.result() for task in ended)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def simulated(switches: Switches, num_batches: int, seed: int) -> dict[str, float]:
    """batch_s: mean seconds a batch; bound_s: of the work that was kept, if engines were always full."""
    loop = VirtualLoop()
    try:

        async def run() -> dict[str, float]:
            collector = Collector(switches, seed)
            work: Coroutine[Any, Any, None] = (
                collector.rounds(num_batches) if switches.ahead < 0 else collector.stream(num_batches)
            )
            await work
            total_s = loop.time()
            rate = NUM_ENGINES * PLACES / step_s(PLACES)
            tokens = sum(collector.kept[: num_batches * GROUPS * GROUP_SIZE])
            return {
                "batch_s": total_s / num_batches,
                "bound_s": tokens / rate / num_batches,
                "kept_mean_tokens": float(np.mean(collector.kept)),
            }

        return loop.run_until_complete(run())
    finally:
        loop.close()


if __name__ == "__main__":
    main()
