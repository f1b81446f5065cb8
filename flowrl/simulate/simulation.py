"""Runs a setting to its end, and holds what the queue did against what it must do."""

from __future__ import annotations

import random
from collections import Counter

from flowrl.simulate.engines import SleepingEngine
from flowrl.simulate.outcome import Outcome, Record
from flowrl.simulate.setting import Setting
from flowrl.simulate.trainer import SleepingTrainer
from flowrl.simulate.world import UNBOUNDED, World
from transfer_queue.staleness import Accounts


class Deadlock(AssertionError):
    """Nothing can happen any more, and updates are left."""


def simulate(setting: Setting, accounts: Accounts | None = None) -> Outcome:
    """Raises Deadlock, or AssertionError for a broken promise: a row too old, twice, or a group split. accounts: of
    another rule, to compare with; its promises are its own."""
    bound = UNBOUNDED if setting.max_staleness is None else setting.max_staleness
    dice = random.Random(setting.seed)
    world = World(setting, accounts or Accounts(setting.batch_rows, bound, surplus_rows=setting.surplus_rows))
    record = Record()
    engines = [SleepingEngine(world, number, record, random.Random(dice.random())) for number in range(setting.engines)]

    def publish(version: int) -> None:
        for engine in engines:
            engine.publish(version)

    groups_a_take = dice.randint(1, setting.batch_groups)
    trainer = SleepingTrainer(world, record, publish, groups_a_take * setting.group_size)
    for engine in engines:
        engine.start()
    trainer.start()
    messages_before = 0
    while not trainer.is_done:
        if not world.step():
            raise Deadlock(f"{setting}: update {trainer.update} at {world.now:.1f} s: {_who_waits(world)}")
        if trainer.update <= setting.updates // 2:
            messages_before = world.distance.messages
    if accounts is None and setting.max_staleness is not None:
        assert max(record.lags) <= bound, f"{setting}: a row was {max(record.lags)} updates old"
    outcome = _outcome(setting, world, record, messages_before)
    if setting.max_staleness is not None:
        _check_credits(world)
    return outcome


def _check_credits(world: World) -> None:
    """With nobody training any more, the bound stops the engines. What the ledgers hold then is what the accounts say:
    each credit was taken once and came back once."""
    while world.step():
        pass
    recount: Counter[int] = Counter()
    for shard in world.shards:
        recount.update(shard.describe()["partitions"]["train"]["outstanding"])
    assert dict(recount) == world.accounts.outstanding, f"{dict(recount)} in ledgers, {world.accounts.outstanding}"


def _who_waits(world: World) -> str:
    waiters = [f"{w['who']} for {w['for']}" for shard in world.shards for w in shard.describe()["waiters"]]
    return f"{', '.join(waiters) or 'nobody'} waiting; {world.accounts.outstanding} outstanding"


def _outcome(setting: Setting, world: World, record: Record, messages_before: int) -> Outcome:
    """Rates are over the second half."""
    ended: Counter[str] = Counter()
    for shard in world.shards:
        ended.update(shard.describe()["ended"])
    half = setting.updates // 2
    ends = [0.0, *record.update_ends]
    rows = sum(record.lags.values())
    return Outcome(
        seconds=world.now,
        rows_s=(setting.updates - half) * setting.batch_rows / max(ends[-1] - ends[half], 1e-9),
        trainer_idle=record.idle_s / max(world.now, 1e-9),
        untrained=1 - record.trained_s / max(record.begun_s, 1e-9),
        max_lag=max(record.lags),
        mean_lag=sum(lag * count for lag, count in record.lags.items()) / rows,
        ended=dict(ended),
        failures=record.failures,
        updates=setting.updates,
        clock_messages=(world.distance.messages - messages_before) / (setting.updates - half),
    )
