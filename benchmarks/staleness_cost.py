"""What the strict staleness rule costs: beside a run without a bound, beside `late: drop`, beside a gate at admission.

    python benchmarks/staleness_cost.py [--seeds 5] [--updates 200] [--out RESULT.json]

Virtual time over the production shards and accounts: the figures depend on the settings below and on nothing of the
machine. Response times are log-normal; the trainer alone could do one update a second, the engines alone 1.25 (so that
neither waits for the other on average, and whatever is lost is lost to the bound). Means over seeds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

from flowrl.simulate import LogNormal, Outcome, Setting, simulate
from flowrl.simulate.rules import AdmissionOnly

BOUNDS = (0, 1, 2, 4, 8)
TAILS = {"short tail": 0.3, "long tail": 1.0, "very long tail": 1.5}
GROUPS, GROUP_SIZE, ENGINES = 16, 4, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--out", type=Path, help="where the result goes as JSON")
    given = parser.parse_args()
    results: list[dict[str, Any]] = []
    print(f"updates of {GROUPS} groups of {GROUP_SIZE}; throughput as a share of a run without a bound\n")
    for tail, sigma in TAILS.items():
        print(f"{tail} (sigma {sigma})")
        print("bound  rule            throughput  trainer idle  untrained work  staleness mean  max")
        baseline = 1.0
        for bound, rule, outcomes in cases(sigma, given.seeds, given.updates):
            line = averages(outcomes)
            baseline = line["rows_s"] if bound is None else baseline
            results.append({"tail": tail, "bound": bound, "rule": rule, **line, "share": line["rows_s"] / baseline})
            print(
                f"{'none' if bound is None else bound:>5}  {rule:<16}{line['rows_s'] / baseline:>9.1%}"
                f"{line['trainer_idle']:>14.1%}{line['untrained']:>16.1%}{line['mean_lag']:>16.2f}{line['max_lag']:>5.0f}",
                flush=True,
            )
        print()
    if given.out is not None:
        given.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def cases(sigma: float, seeds: int, updates: int) -> Iterator[tuple[int | None, str, list[Outcome]]]:
    """The run without a bound comes first."""
    free = setting(sigma, updates)
    yield None, "none", [simulate(dataclasses.replace(free, max_staleness=None, seed=seed)) for seed in range(seeds)]
    for bound in BOUNDS:
        for late in ("wait", "drop") if bound else ("wait",):
            bounded = dataclasses.replace(free, max_staleness=bound, late=late)
            yield bound, late, [simulate(dataclasses.replace(bounded, seed=seed)) for seed in range(seeds)]
        if not bound:
            continue  # a gate at admission with a bound of 0 is the synchronous run
        gated = dataclasses.replace(free, max_staleness=bound, order="arrival")
        accounts = [AdmissionOnly(gated.batch_rows, bound) for _ in range(seeds)]
        yield (
            bound,
            "admission only",
            [simulate(dataclasses.replace(gated, seed=seed), accounts[seed]) for seed in range(seeds)],
        )


def setting(sigma: float, updates: int) -> Setting:
    """The places of the engines follow from Little's law: a group has one until its last response ends, and its mean
    time is estimated here for the tail at hand."""
    places = round(1.25 * GROUPS * longest_of_group_s(sigma) / ENGINES)
    return Setting(
        batch_groups=GROUPS, group_size=GROUP_SIZE, engines=ENGINES, concurrency=max(1, places), max_staleness=None,
        durations=LogNormal(1.0, sigma), row_train_s=0.9 / (GROUPS * GROUP_SIZE), step_s=0.1, updates=updates,
    )  # fmt: skip


def longest_of_group_s(sigma: float, draws: int = 20_000) -> float:
    dice, durations = random.Random(0), LogNormal(1.0, sigma)
    return mean(max(durations.draw(dice) for _ in range(GROUP_SIZE)) for _ in range(draws))


def averages(outcomes: list[Outcome]) -> dict[str, float]:
    names = ("rows_s", "trainer_idle", "untrained", "mean_lag")
    line = {name: mean(getattr(outcome, name) for outcome in outcomes) for name in names}
    return {**line, "max_lag": max(outcome.max_lag for outcome in outcomes)}


if __name__ == "__main__":
    main()
