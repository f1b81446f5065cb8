"""Takes for training: what the clock grants, what waits, what a restarted trainer finds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.transfer_queue.conftest import fill
from transfer_queue import wire
from transfer_queue.cli import report_text
from transfer_queue.staleness import Accounts

Make = Callable[..., Any]


def test_training_take_waits_for_its_update_and_is_told_when_it_is_full(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2, max_staleness=1)
    shard.announce("p", 0)
    groups = shard.reserve(groups=4)
    second = shard.take("train", 2, update=1, wait_s=9.0)
    fill(shard, groups[:1])
    first = shard.take("train", 2, update=0, wait_s=9.0)
    assert (len(first.keys), first.closed) == (1, False)
    assert shard.answer_to(second) is None
    fill(shard, groups[1:])
    last = shard.take("train", 2, update=0, wait_s=9.0)
    assert (len(last.keys), last.closed) == (1, True)
    assert len(shard.answer_to(second).keys) == 2
    again = shard.take("train", 2, update=0, wait_s=9.0)
    assert (again.keys, again.closed) == ([], True)


def test_training_lease_does_not_end_and_is_committed_once(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=1, lease_s=1.0)
    shard.announce("p", 0)
    keys = fill(shard, shard.reserve())
    shard.take("train", 1, update=0)
    shard.pass_time(1000.0)
    assert shard.ask(wire.Drop, keys, "too late").count == 0
    assert "is not in update 3" in shard.ask(wire.Commit, 0, 3, keys).message
    assert shard.ask(wire.Commit, 0, 0, keys).count == 1
    assert shard.ask(wire.Commit, 0, 0, keys).count == 0


def test_rows_of_a_rank_that_is_gone_stay_in_the_update(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=1)
    shard.announce("p", 0)
    groups = shard.reserve()
    shard.ask(wire.Take, "train", 1, None, 0, 0, 60.0, peer=b"dead")
    shard.gone.add(b"dead")
    keys = fill(shard, groups)
    taken = shard.take("train", 1, update=0)
    assert (taken.keys, taken.closed) == (keys, True)


def test_unready_row_with_an_earlier_deadline_keeps_its_place(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2, max_staleness=1)
    shard.announce("p", 0)
    groups = shard.reserve(groups=4)
    fill(shard, groups[:3])
    assert len(shard.take("train", 2, update=0).keys) == 2
    shard.announce("p", 1)
    fill(shard, shard.reserve(groups=2))
    assert len(shard.take("train", 2, update=1).keys) == 1
    number = shard.take("train", 2, update=1, wait_s=9.0)
    assert shard.answer_to(number) is None, "the other place belongs to the row that is due"
    assert shard.shard.describe()["waiters"] == [{"verb": "take", "who": "train", "for": "staleness"}]
    late = fill(shard, groups[3:])
    assert shard.answer_to(number).keys == late


def test_late_row_is_dropped_tried_again_and_given_up(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=1, max_staleness=1, late="drop", max_attempts=2)
    attempts = []
    for version in range(6):
        shard.announce("p", version)
        for group in shard.reserve(groups=2):
            if group.group == 0:
                attempts.append(group.attempt)
            else:
                fill(shard, [group])
        assert shard.take("train", 1, update=version).closed
    assert attempts == [0, 1]
    dropped = [(key.group, key.attempt, fields) for kind, key, fields in shard.events if kind == "dropped"]
    assert dropped == [(0, 0, {"reason": "late"}), (0, 1, {"reason": "late"})]
    assert shard.shard.describe()["ended"] == {"late": 2, "attempts_exhausted": 1}


# A new trainer


def test_who_waits_for_shards_that_have_not_followed_says_so(direct_shard: Make) -> None:
    accounts = Accounts(2, 1, incarnation=1, awaited_shards=2)
    shard = direct_shard(accounts=accounts)
    shard.announce("p", 0)
    shard.reserve(wait_s=9.0)
    described = shard.shard.describe()
    assert described["waiters"] == [
        {"verb": "reserve", "who": "p", "for": "shards to follow incarnation 1: 1 yet to do so"}
    ]
    assert described["clock"]["awaited_shards"] == 1
    assert "; shards yet to follow it: 1" in report_text(described)
    accounts.unclaim(1, [])
    shard.pass_time(0.0)
    assert shard.shard.describe()["waiters"] == []


def test_new_incarnation_gets_back_what_the_last_one_did_not_finish(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2, max_staleness=1)
    accounts = shard.clock.accounts
    shard.announce("p", 0)
    groups = shard.reserve(groups=4)
    keys = fill(shard, groups)
    shard.ask(wire.Commit, 0, 0, shard.take("train", 2, update=0).keys)
    shard.announce("p", 1)
    (younger,) = shard.reserve(groups=1)
    assert len(shard.take("train", 2, update=1).keys) == 2
    accounts.begin(incarnation=1, version=1, num_shards=1)
    shard.pass_time(0.0)
    assert (accounts.awaited_shards, accounts.outstanding) == (0, {1: 2, 2: 1})
    assert shard.take("train", 2, update=1).error == "StaleIncarnation"
    taken = shard.take("train", 2, update=1, incarnation=1)
    assert (taken.keys, taken.closed) == (keys[2:], True)
    assert shard.ask(wire.Commit, 0, 1, keys[2:]).error == "StaleIncarnation"
    assert shard.ask(wire.Commit, 1, 1, keys[2:]).count == 2
    assert shard.put(younger.keys, versions=[1]).unwanted == [], "it belongs to a policy that still is"


def test_rows_of_a_policy_that_is_undone_expire_and_come_again(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2, max_staleness=1)
    accounts = shard.clock.accounts
    for version in (0, 1):
        shard.announce("p", version)
        fill(shard, shard.reserve(groups=2))
        assert shard.take("train", 2, update=version).closed
    accounts.begin(incarnation=1, version=0, num_shards=1)
    shard.pass_time(0.0)
    assert accounts.outstanding == {1: 2}, "those sampled by version 0"
    assert shard.shard.describe()["ended"] == {"rolled_back": 2}
    assert shard.reserve() == [], "the engine must announce what it has loaded now"
    shard.announce("p", 0)
    assert [(group.group, group.attempt) for group in shard.reserve(groups=9)] == [(2, 1), (3, 1)]


def test_nothing_is_granted_before_every_shard_has_rolled_back(direct_shard: Make) -> None:
    accounts = Accounts(4, 0)
    here, there = (direct_shard(accounts=accounts, first_group=first, group_stride=2) for first in (0, 1))
    here.announce("p", 0)
    accounts.begin(incarnation=1, version=0, num_shards=2)
    assert here.reserve() == []
    there.pass_time(0.0)
    assert len(here.reserve()) == 1
