"""`flowrl simulate RECIPE`: what bounds and policies would cost, in virtual time. Starts nothing and needs no model."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flowrl.simulate import Outcome, Setting

TIMES = ("row_train_s", "micro_batch_rows", "step_s", "publish_s", "load_s", "engine_lag_s", "filtered", "failures")


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", nargs="?", help="a YAML recipe; its sizes are simulated")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings that replace the recipe's")
    parser.add_argument("--run", type=Path, help="a run's directory: take the times that it measured")
    parser.add_argument("--bounds", default="0,1,2,4,none", help="of staleness, to compare (0,1,2,4,none)")
    parser.add_argument("--late", default="wait,drop", help="policies, to compare (wait,drop)")
    parser.add_argument("--response-s", type=float, default=1.0, help="mean time of a response (1)")
    parser.add_argument("--sigma", type=float, default=1.0, help="of its log-normal tail; 0 is constant (1)")
    parser.add_argument("--longest-s", type=float, default=float("inf"), help="where responses are cut off")
    for name, text in (
        ("row_train_s", "the trainer's time for a row"),
        ("step_s", "for the end of an update, publishing included"),
        ("publish_s", "from then until engines may load"),
        ("load_s", "for an engine to load"),
        ("engine_lag_s", "mean delay until an engine notices"),
        ("filtered", "share of groups that are filtered out"),
        ("failures", "share of groups with which an engine dies"),
    ):
        parser.add_argument("--" + name.replace("_", "-"), type=float, help=f"{text} (0)")
    parser.add_argument("--micro-batch-rows", type=int, help="with which the trainer begins at once (1)")
    parser.add_argument("--nodes", type=int, default=1, help="that the recipe runs on, a shard on each (1)")
    parser.add_argument("--updates", type=int, help="(100; in trials 100 to 300)")
    parser.add_argument("--seed", type=int, default=0, help="(0)")
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--trials", type=int, help="no recipe: check the queue's promises in so many random settings")


def run(arguments: argparse.Namespace) -> int:
    if arguments.trials is not None:
        return run_trials(arguments.trials, arguments.seed, arguments.updates)
    if arguments.recipe is None:
        raise ValueError("recipe: missing; name a recipe, or say --trials")
    from flowrl.simulate import simulate

    rows = []
    for setting in settings_from(arguments):
        outcome = simulate(setting)
        rows.append((setting.max_staleness, setting.late, outcome))
        if arguments.json:
            line = {"bound": setting.max_staleness, "late": setting.late, **dataclasses.asdict(outcome)}
            print(json.dumps(line), flush=True)
    if not arguments.json:
        print(table(rows))
    return 0


def settings_from(arguments: argparse.Namespace) -> list[Setting]:
    """One for each bound and policy. At 0 nothing is late, and without a bound neither: one policy is enough there."""
    setting = setting_from(arguments)
    policies = arguments.late.split(",")
    return [
        dataclasses.replace(setting, max_staleness=bound, late=late)
        for bound in bounds_from(arguments.bounds)
        for late in (policies if bound else policies[:1])
    ]


def setting_from(arguments: argparse.Namespace) -> Setting:
    from flowrl import config
    from flowrl.simulate import LogNormal
    from flowrl.simulate.of_run import measured_times, setting_of_recipe

    recipe = config.load(arguments.recipe, arguments.overrides)
    setting = setting_of_recipe(recipe, arguments.nodes)
    updates = 100 if arguments.updates is None else arguments.updates
    times: dict[str, Any] = {"updates": updates, "seed": arguments.seed}
    if arguments.run is not None:
        times |= measured_times(arguments.run, setting.batch_rows, recipe.train.micro_batch_tokens)
    else:
        times["durations"] = LogNormal(arguments.response_s, arguments.sigma, arguments.longest_s)
    times |= {name: value for name in TIMES if (value := getattr(arguments, name)) is not None}
    return dataclasses.replace(setting, **times)


def bounds_from(text: str) -> list[int | None]:
    try:
        return [None if part == "none" else int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"bounds: {text!r}; must be whole numbers or none, with commas between") from None


def table(rows: list[tuple[int | None, str, Outcome]]) -> str:
    fastest = max(outcome.rows_s for *_, outcome in rows)
    lines = ["bound  late   rows/s  of best  trainer idle  untrained work  staleness mean  max  dropped late"]
    for bound, late, outcome in rows:
        lines.append(
            f"{'none' if bound is None else bound:>5}  {late:<5}{outcome.rows_s:>8.2f}{outcome.rows_s / fastest:>9.0%}"
            f"{outcome.trainer_idle:>14.0%}{outcome.untrained:>16.0%}{outcome.mean_lag:>16.2f}{outcome.max_lag:>5}"
            f"{outcome.ended.get('late', 0):>14}"
        )
    return "\n".join(lines)


def run_trials(trials: int, first_seed: int, num_updates: int | None) -> int:
    """Exit code 1 if a promise was broken; each is named."""
    from flowrl.simulate import simulate
    from flowrl.simulate.trials import random_setting

    broken = rows = updates = late = 0
    for seed in range(first_seed, first_seed + trials):
        setting = random_setting(seed, num_updates)
        try:
            outcome = simulate(setting)
        except AssertionError as error:
            broken += 1
            print(f"seed {seed}: {type(error).__name__}: {error}", flush=True)
            continue
        updates += outcome.updates
        rows += outcome.updates * setting.batch_rows
        late += outcome.ended.get("late", 0)
    print(f"{trials} settings, {updates} updates, {rows} rows trained, {late} dropped late: {broken} broken promises")
    return 1 if broken else 0
