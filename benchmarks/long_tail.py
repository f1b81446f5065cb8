"""What each remedy for the long tail of response lengths is worth: seconds to collect a batch, switch by switch.

    python benchmarks/long_tail.py [--batches 12] [--seeds 3] [--out RESULT.json]

Engines live in virtual time (`virtual_engines.py`). What decides who runs where, what is admitted, what an update takes
and what is dropped is the production code: the router of `flowrl/rollout/scheduling/routing.py`, `first_to_end` of
`flowrl/rollout/scheduling/groups.py`, the staleness accounts of `transfer_queue/staleness.py`.

A batch is 64 groups of 8 samples on 8 engines of 16 places. Lengths are log-normal (σ = 1.2, median 400, at most
16,384), half of the variance is the prompt's. Three prompts in ten are tied and must be replaced. A reward takes 2 s,
16 at once. The bound is the work of the samples that were kept, spread evenly over engines that are always full.

    rounds        a whole batch, then its rewards, then as many groups as were tied, until there are enough
    stream        rewards as responses end, tied groups replaced at once (rollout.filter_tied); staleness.max = 0
    oversampling  16 groups more than the update needs under way, what is over dropped (rollout.oversampling = 16)
    redundancy    10 samples a group, the first 8 kept (rollout.redundancy = 2)
    ahead         groups of the next update fill free places (staleness.max = 1)
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # where it runs as a script

from benchmarks.virtual_engines import PLACES, VirtualEngine, VirtualLoop, step_s
from flowrl.rollout.scheduling.groups import first_to_end
from flowrl.rollout.scheduling.routing import Router
from flowrl.rollout.scheduling.surplus import is_overdue
from transfer_queue.staleness import Accounts

NUM_ENGINES = 8
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
    stream: bool = False
    oversampling: int = 0
    redundancy: int = 0
    ahead: int = 0


ALL = Switches(stream=True, oversampling=16, redundancy=2, ahead=1)
STREAM = Switches(stream=True)
CASES = {
    "off: rounds": Switches(),
    "rounds + redundancy": Switches(redundancy=2),
    "stream": STREAM,
    "stream + oversampling": dataclasses.replace(STREAM, oversampling=16),
    "stream + redundancy": dataclasses.replace(STREAM, redundancy=2),
    "stream + ahead": dataclasses.replace(STREAM, ahead=1),
    "stream + ahead 2": dataclasses.replace(STREAM, ahead=2),
    "all": ALL,
    "all without oversampling": dataclasses.replace(ALL, oversampling=0),
    "all without redundancy": dataclasses.replace(ALL, redundancy=0),
    "all without ahead": dataclasses.replace(ALL, ahead=0),
}


def main() -> None:
    given = parse()
    rows = []
    for name, switches in CASES.items():
        runs = [simulated(switches, given.batches, seed) for seed in range(given.seeds)]
        rows.append({"switches": name, **{key: round(statistics.mean(run[key] for run in runs), 2) for key in runs[0]}})
        rows[-1]["speed_up"] = round(rows[0]["batch_s"] / rows[-1]["batch_s"], 2)
        print(rows[-1], flush=True)
    result = {"date": time.strftime("%Y-%m-%d"), "batches": given.batches, "seeds": given.seeds, "cases": rows}
    print(json.dumps(result, indent=2))
    if given.out is not None:
        given.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    return parser.parse_args()


@dataclass(eq=False)
class SampledGroup:
    """deadline: by the version at its reservation, and when it is complete by that of its oldest token."""

    deadline: int
    is_tied: bool
    lengths: list[int]
    kept: list[int] = dataclasses.field(default_factory=list)
    versions: list[int] = dataclasses.field(default_factory=list)


class Collector:
    """Samples groups and says when each batch of untied ones is there. kept: lengths of what was trained."""

    def __init__(self, switches: Switches, seed: int) -> None:
        self.switches = switches
        surplus_rows = switches.oversampling * GROUP_SIZE
        self.accounts = Accounts(GROUPS * GROUP_SIZE, switches.ahead, surplus_rows=surplus_rows)
        self.engines = [VirtualEngine() for _ in range(NUM_ENGINES)]
        self.router = Router(NUM_ENGINES)
        self.rewards = asyncio.Semaphore(REWARD_PLACES)
        self.dice = np.random.default_rng(seed)
        self.num_groups = 0
        self.kept: list[int] = []
        self.made = 0

    def new_group(self) -> SampledGroup:
        count = GROUP_SIZE + self.switches.redundancy
        spread = np.sqrt(0.5) * (self.dice.normal() + self.dice.normal(size=count))
        lengths = np.clip(MEDIAN * np.exp(SIGMA * spread), 1, LONGEST).astype(int).tolist()
        deadline = self.accounts.version + self.switches.ahead
        return SampledGroup(deadline, bool(self.dice.random() < TIED), lengths)

    async def sample(self, group: SampledGroup) -> None:
        number, self.num_groups = self.num_groups, self.num_groups + 1
        rewards: list[asyncio.Task[None]] = []

        def accept(place: int, length: int) -> None:
            group.kept.append(length)
            if self.switches.stream:
                rewards.append(asyncio.create_task(self._reward()))

        try:
            candidates = [self._generate(number, length, group) for length in group.lengths]
            await first_to_end(candidates, GROUP_SIZE, accept)
            await asyncio.gather(*rewards)
        finally:
            for reward in rewards:
                reward.cancel()

    async def _generate(self, number: int, length: int, group: SampledGroup) -> int:
        server = self.router.choose((number,))
        try:
            await self.engines[server].generate(length, lambda: group.versions.append(self.accounts.version))
        finally:
            self.router.leave(server)
        self.made += length
        return length

    async def _reward(self) -> None:
        async with self.rewards:
            await asyncio.sleep(REWARD_S)

    async def rounds(self, num_batches: int) -> None:
        for _ in range(num_batches):
            missing = GROUPS
            while missing:
                groups = [self.new_group() for _ in range(missing)]
                await asyncio.gather(*map(self.sample, groups))
                await asyncio.gather(*(self._reward() for _ in range(missing * GROUP_SIZE)))
                useful = [group for group in groups if not group.is_tied]
                self.kept += [length for group in useful for length in group.kept]
                missing -= len(useful)

    async def stream(self, num_batches: int) -> None:
        """Admits and takes as the accounts allow; new weights reach running responses at once."""
        running: dict[asyncio.Task[None], SampledGroup] = {}
        ready: list[SampledGroup] = []
        accounts = self.accounts
        while accounts.version < num_batches:
            while accounts.admissible(accounts.version + self.switches.ahead, GROUP_SIZE):
                group = self.new_group()
                accounts.admit(group.deadline, GROUP_SIZE)
                running[asyncio.create_task(self.sample(group))] = group
            ended, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
            for task in ended:
                self._settle(running.pop(task), ready)
            self._train(ready)
            for task in [task for task, group in running.items() if is_overdue(group.deadline, accounts.version)]:
                task.cancel()
                accounts.retire(running.pop(task).deadline, GROUP_SIZE)
                await asyncio.gather(task, return_exceptions=True)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _settle(self, group: SampledGroup, ready: list[SampledGroup]) -> None:
        if group.is_tied:
            self.accounts.retire(group.deadline, GROUP_SIZE)
            return
        deadline = min(group.versions) + self.switches.ahead
        if deadline > group.deadline:
            self.accounts.shift(group.deadline, deadline, GROUP_SIZE)
        group.deadline = deadline
        ready.append(group)

    def _train(self, ready: list[SampledGroup]) -> None:
        """The earliest deadline first; what no update can hold any more is dropped."""
        ready.sort(key=lambda group: group.deadline)
        while ready:
            if is_overdue(ready[0].deadline, self.accounts.version):
                self.accounts.retire(ready.pop(0).deadline, GROUP_SIZE)
            elif self.accounts.claimable(ready[0].deadline, GROUP_SIZE):
                self.kept += ready[0].kept
                self.accounts.claim(ready.pop(0).deadline, GROUP_SIZE)
            else:
                return


def simulated(switches: Switches, num_batches: int, seed: int) -> dict[str, float]:
    """batch_s: mean seconds a batch; bound_s: of the work that was kept, if engines were always full; times_bound.
    kept_mean_tokens: of the samples kept. kept_share: of the tokens in complete samples."""
    loop = VirtualLoop()
    try:

        async def run() -> dict[str, float]:
            collector = Collector(switches, seed)
            work: Coroutine[Any, Any, None] = (
                collector.stream(num_batches) if switches.stream else collector.rounds(num_batches)
            )
            await work
            rate = NUM_ENGINES * PLACES / step_s(PLACES)
            batch_s, bound_s = loop.time() / num_batches, sum(collector.kept) / rate / num_batches
            return {
                "batch_s": batch_s,
                "bound_s": bound_s,
                "times_bound": batch_s / bound_s,
                "kept_mean_tokens": float(np.mean(collector.kept)),
                "kept_share": sum(collector.kept) / collector.made,
            }

        return loop.run_until_complete(run())
    finally:
        loop.close()


if __name__ == "__main__":
    main()
