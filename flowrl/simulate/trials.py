"""Settings drawn at random, over the whole range in which the queue's promises must hold."""

from __future__ import annotations

import random

from flowrl.simulate.durations import Constant, Durations, LogNormal
from flowrl.simulate.setting import Setting


def random_setting(seed: int, updates: int | None = None) -> Setting:
    """Updates of 4 or 16 rows in groups of 1 to 8, 4 to 64 rows under way, 1 to 8 shards, bounds of 0 to 4, with and
    without a surplus, any order and policy, engines that lag, die and are filtered, accounts near and far. One
    seed, one setting."""
    dice = random.Random(seed)
    batch_rows = dice.choice((4, 16))
    group_size = dice.choice([size for size in (1, 2, 4, 8) if batch_rows % size == 0])
    shards = dice.choice((1, 1, 2, 3, 4, 8))
    engines = shards * dice.choice((1, 1, 2))
    rows_under_way = dice.choice((4, 8, 16, 32, 64))
    return Setting(
        batch_groups=batch_rows // group_size,
        group_size=group_size,
        max_staleness=dice.choice((0, 1, 2, 4)),
        surplus_groups=dice.choice((0, 0, 1, 3)),
        late=dice.choice(("wait", "drop")),
        order=dice.choice(("deadline", "freshest", "arrival")),
        max_attempts=dice.choice((1, 3)),
        engines=engines,
        concurrency=max(1, rows_under_way // group_size // engines),
        shards=shards,
        clock_s=dice.choice((0.0, 0.001, 0.2)),
        durations=_durations(dice),
        row_train_s=dice.choice((0.0, 0.05)),
        step_s=dice.choice((0.0, 0.1, 1.0)),
        publish_s=dice.choice((0.0, 0.3)),
        load_s=dice.choice((0.0, 0.2)),
        engine_lag_s=dice.choice((0.0, 0.5, 5.0)),
        filtered=dice.choice((0.0, 0.1, 0.5)),
        failures=dice.choice((0.0, 0.02)),
        updates=updates if updates is not None else dice.randint(100, 300),
        seed=dice.randrange(1 << 30),
        micro_batch_rows=dice.choice((1, 1, 3, 16)),
    )


def _durations(dice: random.Random) -> Durations:
    return dice.choice((Constant(1.0), LogNormal(1.0, 0.5), LogNormal(1.0, 1.0), LogNormal(1.0, 2.0)))
