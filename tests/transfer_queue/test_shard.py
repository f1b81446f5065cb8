"""What a shard grants, parks, gives back and frees, with the test's own time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.transfer_queue.conftest import fill, keys_of
from transfer_queue import wire
from transfer_queue.clock import LocalClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.rows import RowKey
from transfer_queue.staleness import Accounts

Make = Callable[..., Any]


# Reserving


def test_producer_gets_one_update_until_it_announces_the_next_version(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=4, max_staleness=0)
    shard.announce("p", 0)
    groups = shard.reserve(groups=10)
    assert len(groups) == 4
    assert shard.reserve(groups=1) == []
    fill(shard, groups)
    taken = shard.take("train", 4, update=0)
    assert (len(taken.keys), taken.closed) == (4, True)
    assert shard.reserve(groups=1) == [], "the engine still holds version 0"
    shard.announce("p", 1)
    assert [group.version for group in shard.reserve(groups=9)] == [1] * 4


def test_parked_reservation_wakes_at_an_announcement(direct_shard: Make) -> None:
    shard = direct_shard()
    number = shard.reserve(groups=2, wait_s=5.0)
    assert shard.answer_to(number) is None
    shard.announce("p", 0)
    assert len(shard.answer_to(number).groups) == 2


def test_reservation_in_vain_ends_empty_when_its_patience_ends(direct_shard: Make) -> None:
    shard = direct_shard()
    number = shard.reserve(wait_s=5.0)
    shard.pass_time(4.9)
    assert shard.answer_to(number) is None
    assert shard.shard.next_deadline() == 5.0
    shard.pass_time(0.2)
    assert shard.answer_to(number).groups == []


def test_shards_never_give_out_the_same_group(direct_shard: Make) -> None:
    accounts = Accounts(8, 0)
    shards = [direct_shard(accounts=accounts, first_group=first, group_stride=2) for first in (0, 1)]
    numbers = []
    for shard in shards:
        shard.announce("p", 0)
        numbers.append([group.group for group in shard.reserve(groups=4)])
    assert numbers == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_group_size_that_never_fills_an_update_is_refused_by_name(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=4)
    shard.announce("p", 0)
    refused = shard.reserve(size=3)
    assert "group_size: 3; must divide the 4 rows" in refused.message
    assert len(shard.reserve(size=2)) == 1
    assert "partition 'train' has 2" in shard.reserve(size=4).message


def test_bytes_are_promised_before_they_come_and_freed_when_all_are_done(direct_shard: Make) -> None:
    shard = direct_shard(consumers={"eval": ConsumerSpec(("tokens",), partition="eval")}, byte_limit=10_000)
    groups = shard.reserve(groups=9, partition="eval", row_bytes=3000)
    assert len(groups) == 3
    number = shard.reserve(partition="eval", row_bytes=3000, wait_s=9.0)
    shard.put(keys_of(groups))
    assert shard.answer_to(number) is None
    shard.ask(wire.Ack, "eval", shard.take("eval").keys)
    assert len(shard.answer_to(number).groups) == 1
    assert "byte_limit is 10000" in shard.reserve(partition="eval", row_bytes=10_001).message


def test_partition_that_nobody_trains_on_knows_no_staleness(direct_shard: Make) -> None:
    shard = direct_shard(consumers={"eval": ConsumerSpec(("tokens",), partition="eval")})
    assert len(shard.reserve(groups=100, size=3, partition="eval")) == 100


# Putting


def test_repeated_put_is_accepted_and_a_different_one_refused(direct_shard: Make) -> None:
    shard = direct_shard()
    shard.announce("p", 0)
    keys = keys_of(shard.reserve(groups=2))
    assert shard.put(keys, value=1.0).unwanted == []
    assert shard.put(keys, value=1.0).unwanted == []
    assert shard.put(keys, value=2.0).error == "DuplicateRow"
    assert len(shard.take("reward", 9).keys) == 2


def test_refused_put_changes_nothing(direct_shard: Make) -> None:
    shard = direct_shard(max_staleness=1)
    shard.announce("p", 1)
    shard.clock.accounts.version = 1
    keys = keys_of(shard.reserve(groups=2))
    assert "reserved at 1" in shard.put(keys, versions=[1, 0]).message
    assert shard.take("reward", 9).keys == []
    assert shard.put(keys, versions=[1, 1]).unwanted == []


@pytest.mark.parametrize(
    "key", [RowKey("train", 7, 0), RowKey("train", 0, 1), RowKey("x", 0, 0), RowKey("train", 0, 0, 1)]
)
def test_row_that_was_never_reserved_is_refused_by_name(direct_shard: Make, key: RowKey) -> None:
    shard = direct_shard()
    shard.announce("p", 0)
    shard.reserve()
    assert shard.put([key]).error == "RowRefused"


def test_put_for_a_dropped_row_is_ignored(direct_shard: Make) -> None:
    shard = direct_shard()
    shard.announce("p", 0)
    keys = keys_of(shard.reserve(groups=2))
    assert shard.ask(wire.Drop, keys[:1], "tied").count == 1
    assert shard.put(keys).unwanted == [0]
    assert shard.take("reward", 9).keys == keys[1:]


def test_younger_tokens_move_the_deadline_and_make_room(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=4, max_staleness=1)
    shard.clock.accounts.version = 1
    shard.announce("p", 0)
    keys = keys_of(shard.reserve(groups=9))
    assert len(keys) == 4
    assert shard.reserve() == []
    shard.announce("p", 1)
    shard.put(keys, versions=[1] * 4)
    assert shard.clock.accounts.outstanding == {2: 4}
    assert len(shard.reserve(groups=9)) == 4


# Ordinary leases


def test_row_is_ready_when_its_columns_are_and_each_consumer_sees_it_once(direct_shard: Make) -> None:
    shard = direct_shard()
    shard.announce("p", 0)
    groups = shard.reserve(groups=2, size=2)
    keys = keys_of(groups)
    shard.put(keys[:3])
    assert shard.take("reward", 9).keys == keys[:3]
    assert shard.take("reward", 9).keys == []
    shard.put(keys[:3], ("reward",))
    assert shard.take("advantage", 9).keys == keys[:2], "the second group is not whole"


def test_groups_are_never_split(direct_shard: Make) -> None:
    shard = direct_shard()
    shard.announce("p", 0)
    keys = keys_of(shard.reserve(groups=2, size=2))
    shard.put(keys, ("reward",))
    assert shard.take("advantage", 3).keys == keys[:2]
    assert "max_rows: 1" in shard.take("advantage", 1).message
    assert shard.take("advantage", 3).keys == keys[2:]


def test_lost_lease_is_delivered_again_and_a_late_ack_still_counts(direct_shard: Make) -> None:
    shard = direct_shard(lease_s=10.0)
    shard.announce("p", 0)
    keys = keys_of(shard.reserve(groups=2))
    shard.put(keys)
    assert shard.take("reward", 2).keys == keys
    number = shard.take("reward", 2, wait_s=60.0)
    shard.pass_time(9.9)
    assert shard.answer_to(number) is None
    shard.pass_time(0.2)
    assert shard.answer_to(number).keys == keys
    assert shard.ask(wire.Ack, "reward", keys).count == 2
    assert shard.ask(wire.Ack, "reward", keys).count == 0
    shard.pass_time(20.0)
    assert shard.take("reward", 2).keys == []


def test_row_for_a_consumer_that_is_gone_goes_to_the_next_at_once(direct_shard: Make) -> None:
    shard = direct_shard()
    shard.announce("p", 0)
    keys = keys_of(shard.reserve())
    shard.ask(wire.Take, "reward", 1, None, None, 0, 60.0, peer=b"dead")
    number = shard.take("reward", wait_s=60.0)
    shard.gone.add(b"dead")
    shard.put(keys)
    assert shard.answer_to(number).keys == keys


def test_reservation_for_a_producer_that_is_gone_comes_back(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=1)
    shard.gone.add(b"dead")
    shard.reserve("p", wait_s=60.0, peer=b"dead")
    shard.announce("p", 0)
    (group,) = shard.reserve()
    assert (group.group, group.attempt) == (0, 1)


def test_budget_counts_the_lengths_of_a_column(direct_shard: Make) -> None:
    shard = direct_shard()
    shard.announce("p", 0)
    keys = keys_of(shard.reserve(groups=4))
    shard.put(keys)
    assert shard.ask(wire.Take, "reward", 9, ("tokens", 3), None, 0, 0.0).keys == keys[:3]
    assert "'reward' reads" in shard.ask(wire.Take, "reward", 9, ("nonsense", 3), None, 0, 0.0).message


def test_storage_is_freed_when_every_consumer_is_done(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2)
    shard.announce("p", 0)
    keys = fill(shard, shard.reserve(groups=2))
    for consumer in ("reward", "advantage"):
        shard.ask(wire.Ack, consumer, shard.take(consumer, 9).keys)
    shard.take("train", 9, update=0)
    assert shard.shard.describe()["stored_rows"] == 2
    shard.ask(wire.Commit, 0, 0, keys[:1])
    assert shard.shard.describe()["stored_rows"] == 1
    shard.ask(wire.Commit, 0, 0, keys)
    description = shard.shard.describe()
    assert (description["stored_rows"], description["stored_bytes"], description["promised_bytes"]) == (0, 0, 0)
    assert description["partitions"]["train"]["groups"] == 0


# Ends


def test_lost_producers_groups_come_back_whole_before_new_ones(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=8)
    for producer in ("p", "q"):
        shard.announce(producer, 0)
    mine = shard.reserve("p", groups=2, size=2)
    other = shard.reserve("q", groups=1, size=2)
    shard.put(mine[0].keys)
    shard.put(mine[1].keys[:1])
    assert shard.ask(wire.ProducerLost, "p").count == 1, "the first group is finished and stays"
    assert shard.clock.accounts.outstanding == {0: 4}
    again = shard.reserve("q", groups=2, size=2)
    assert [(group.group, group.attempt) for group in again] == [(1, 1), (3, 0)]
    assert shard.put(mine[1].keys).unwanted == [0, 1], "the first attempt is gone"
    assert shard.put(again[0].keys).unwanted == []
    assert shard.take("reward", 9).keys == [*mine[0].keys, *again[0].keys]
    assert shard.put(other[0].keys).unwanted == []


def test_lost_producer_waits_no_longer(direct_shard: Make) -> None:
    shard = direct_shard()
    number = shard.reserve("p", wait_s=60.0)
    shard.ask(wire.ProducerLost, "p")
    assert shard.answer_to(number).groups == []


def test_drop_takes_whole_groups_and_returns_their_capacity_once(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=4)
    shard.announce("p", 0)
    groups = shard.reserve(groups=2, size=2)
    shard.put(keys_of(groups))
    assert shard.ask(wire.Drop, [groups[0].keys[0]], "tied").count == 2
    assert shard.ask(wire.Drop, [groups[0].keys[1]], "tied").count == 0
    assert shard.clock.accounts.outstanding == {0: 2}
    assert shard.shard.describe()["ended"] == {"tied": 2}
    assert [group.group for group in shard.reserve(groups=2, size=2)] == [2]


def test_events_name_every_row(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2)
    shard.announce("p", 0)
    (group,) = shard.reserve(size=2)
    fill(shard, [group])
    shard.take("train", 2, update=0)
    assert [(kind, key, fields) for kind, key, fields in shard.events] == [
        ("reserved", key, {"producer": "p", "version": 0}) for key in group.keys
    ] + [("taken", key, {"update": 0}) for key in group.keys]


def test_optional_column_comes_along_if_it_is_there(direct_shard: Make) -> None:
    consumers = {"eval": ConsumerSpec(("tokens",), optional=("note",), partition="eval")}
    shard = direct_shard(consumers=consumers)
    keys = keys_of(shard.reserve(groups=2, partition="eval"))
    shard.put(keys[1:], ("note",), value=7.0)
    shard.put(keys)
    number = next(shard._ids)
    shard.shard.handle(b"peer", wire.Take(number, "eval", 9, None, None, 0, 0.0), {}, 0.0)
    _, columns = shard.answers[b"peer", number]
    assert [row.tolist() for row in columns["note"]] == [[], [7.0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [("lease_s", 0.0), ("group_stride", 0), ("consumers", {}), ("late", "never"), ("endpoint", "udp://x")],
)
def test_bad_setting_is_refused_by_name(field: str, value: Any) -> None:
    settings = {"endpoint": "ipc://x", "consumers": {"eval": ConsumerSpec(("tokens",))}, field: value}
    with pytest.raises(ValueError, match=field):
        QueueConfig(**settings)


def test_clock_heard_too_late_leaves_requests_parked_until_then(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2)
    clock: LocalClock = shard.clock
    clock.batch_rows = None
    shard.announce("p", 0)
    number = shard.reserve(wait_s=9.0)
    assert shard.answer_to(number) is None
    clock.batch_rows = 2
    clock.on_change()
    assert len(shard.answer_to(number).groups) == 1
