"""What users decide: which late groups go, in which order ready ones are taken, when a last update closes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.transfer_queue.clock_host import clock_host
from tests.transfer_queue.conftest import CONSUMERS, fill, keys_of
from transfer_queue import wire
from transfer_queue.client import QueueClient
from transfer_queue.clock import RemoteClock
from transfer_queue.config import ConsumerSpec
from transfer_queue.policies import Blocker, ReadyGroup, choose_late, late_policy, order_policy
from transfer_queue.rows import Column
from transfer_queue.staleness import Accounts

Make = Callable[..., Any]
HERE = "tests.transfer_queue.test_policies"


def last_one(blockers: Sequence[Blocker]) -> Sequence[Blocker]:
    return blockers[-1:]


def nearly_done_ones_stay(blockers: Sequence[Blocker]) -> Sequence[Blocker]:
    return [blocker for blocker in blockers if blocker.num_unready == blocker.num_rows][:1]


def last_group_first(group: ReadyGroup) -> int:
    return -group.group


def odd_groups_first(group: ReadyGroup) -> int:
    return -(group.group % 2)


def blocked_by(direct_shard: Make, num_blockers: int, size: int = 1, **config: Any) -> tuple[Any, list[Any]]:
    """A shard at update 1, in which groups of version 0 are unready and hold up ready ones of version 1. Two updates'
    worth were reserved at version 0; half of them fill update 0, `num_blockers` groups never come."""
    groups_an_update = 4
    shard = direct_shard(batch_rows=groups_an_update * size, max_staleness=1, **config)
    shard.announce("p", 0)
    groups = shard.reserve(groups=2 * groups_an_update, size=size)
    fill(shard, groups[: 2 * groups_an_update - num_blockers])
    assert len(shard.take("train", groups_an_update * size, update=0).keys) == groups_an_update * size
    shard.announce("p", 1)
    fill(shard, shard.reserve(groups=groups_an_update, size=size))
    return shard, groups[-num_blockers:]


# Late


def test_users_policy_says_which_blocker_goes(direct_shard: Make) -> None:
    shard, blockers = blocked_by(direct_shard, 3, late=f"{HERE}:last_one")
    taken = shard.take("train", 2, update=1)
    assert len(taken.keys) == 1, "the one due now"
    assert len(shard.take("train", 1, update=1).keys) == 1, "one that a dropped blocker made room for"
    assert [key.group for kind, key, _ in shard.events if kind == "dropped"] == [blockers[-1].group]


def test_users_policy_that_keeps_a_blocker_waits_for_it(direct_shard: Make) -> None:
    shard, (blocker,) = blocked_by(direct_shard, 1, size=2, late=f"{HERE}:nearly_done_ones_stay")
    shard.put(blocker.keys[:1], ("tokens", "advantage"), [0])
    assert len(shard.take("train", 6, update=1).keys) == 6
    number = shard.take("train", 2, update=1, wait_s=9.0)
    assert shard.answer_to(number) is None
    assert shard.shard.describe()["ended"] == {}
    shard.put(blocker.keys[1:], ("tokens", "advantage"), [0])
    assert shard.answer_to(number).keys == list(blocker.keys)


def test_no_more_is_dropped_than_the_refused_group_needs(direct_shard: Make) -> None:
    shard, blockers = blocked_by(direct_shard, 4, late="drop")
    assert len(shard.take("train", 1, update=1).keys) == 1
    assert shard.shard.describe()["ended"] == {"late": 1}
    back = shard.reserve(groups=1)
    assert [(group.group, group.attempt) for group in back] == [(blockers[0].group, 1)], "its prompt is tried again"


def test_blocker_on_another_shard_is_dropped_there(direct_shard: Make) -> None:
    accounts = Accounts(4, 1)
    here, there = (direct_shard(accounts=accounts, first_group=first, group_stride=2, late="drop") for first in (0, 1))
    for shard in (here, there):
        shard.announce("p", 0)
    here_groups, blockers = here.reserve(groups=4), there.reserve(groups=4)
    fill(here, here_groups)
    assert len(here.take("train", 4, update=0).keys) == 4
    here.announce("p", 1)
    fill(here, here.reserve(groups=4))
    number = here.take("train", 4, update=1, wait_s=9.0)
    assert here.answer_to(number) is None, "nothing here is late"
    there.pass_time(0.0)
    assert len(here.answer_to(number).keys) == 1
    assert (here.shard.describe()["ended"], there.shard.describe()["ended"]) == ({}, {"late": 1})
    assert there.events[-1][1].group == blockers[0].group
    assert accounts.outstanding == {1: 3, 2: 3}


def test_shards_take_turns_so_that_one_drops_and_not_all(direct_shard: Make) -> None:
    accounts = Accounts(6, 1)
    shards = [direct_shard(accounts=accounts, first_group=at, group_stride=3, late="drop") for at in range(3)]
    for shard in shards:
        shard.announce("p", 0)
    fill(shards[0], shards[0].reserve(groups=6))
    for shard in shards[1:]:
        shard.reserve(groups=3)
    assert shards[0].take("train", 6, update=0).closed
    shards[0].announce("p", 1)
    fill(shards[0], shards[0].reserve(groups=1))
    number = shards[0].take("train", 1, update=1, wait_s=9.0)
    for shard in shards[1:]:
        shard.pass_time(0.0)
    assert len(shards[0].answer_to(number).keys) == 1
    assert sum(shard.shard.describe()["ended"].get("late", 0) for shard in shards) == 1


def test_late_rows_of_two_live_shards_are_dropped_over_sockets(serve: Make, tmp_path: Path) -> None:
    accounts = Accounts(4, 1)
    with clock_host(f"ipc://{tmp_path}/clock", accounts) as host:
        servers = [
            serve(RemoteClock(host.endpoint, f"s{at}"), f"s{at}", first_group=at, group_stride=2, late="drop")
            for at in (0, 1)
        ]
        endpoints = [server.endpoint for server in servers]
        with QueueClient(endpoints) as here, QueueClient(endpoints[::-1]) as there:
            here.announce("p", 0)
            keys = keys_of(here.reserve("p", 4, 1))
            stuck = there.reserve("p", 4, 1, wait_s=5.0)
            assert len(keys) == len(stuck) == 4
            all_columns(here, keys, 0)
            while not (taken := here.take("train", 4, update=0, wait_s=5.0)).closed:
                assert len(taken.rows), "the first update did not fill"
            here.announce("p", 1)
            all_columns(here, keys_of(here.reserve("p", 4, 1, wait_s=5.0)), 1)
            trained = []
            while not (taken := here.take("train", 4, update=1, wait_s=5.0)).closed or len(taken.rows):
                assert len(taken.rows), "the second update did not fill"
                trained += taken.rows.keys
                if taken.closed:
                    break
            assert len(trained) == 4
            ended = [report["ended"] for report in here.introspect().values()]
            assert ended == [{}, {"late": 4}]
        for server in servers:
            server.stop()


def all_columns(client: QueueClient, keys: Sequence[Any], version: int) -> None:
    for name in ("tokens", "reward", "advantage"):
        versions = [version] * len(keys) if name == "tokens" else None
        client.put(keys, {name: Column.scalars([0] * len(keys), "float32")}, versions=versions)


# Order


def test_groups_are_taken_in_the_users_order(direct_shard: Make) -> None:
    spec = ConsumerSpec(columns=("tokens",), order=f"{HERE}:last_group_first")
    shard = direct_shard(consumers={**CONSUMERS, "reward": spec})
    shard.announce("p", 0)
    for group in shard.reserve(groups=4):
        shard.put(group.keys)
    assert [key.group for key in shard.take("reward", 4).keys] == [3, 2, 1, 0]


def test_arrival_order_is_that_of_the_puts(direct_shard: Make) -> None:
    shard = direct_shard(consumers={**CONSUMERS, "reward": ConsumerSpec(columns=("tokens",), order="arrival")})
    shard.announce("p", 0)
    groups = shard.reserve(groups=3)
    for at in (2, 0, 1):
        shard.put(groups[at].keys)
    assert [key.group for key in shard.take("reward", 3).keys] == [2, 0, 1]


def test_row_whose_lease_was_lost_is_delivered_once_more_and_not_twice(direct_shard: Make) -> None:
    spec = ConsumerSpec(columns=("tokens",), order=f"{HERE}:last_group_first")
    shard = direct_shard(consumers={**CONSUMERS, "reward": spec}, lease_s=1.0)
    shard.announce("p", 0)
    (group,) = shard.reserve(size=4)
    shard.put(group.keys)
    for _ in range(3):
        assert len(shard.take("reward", 9).keys) == 4
        assert shard.take("reward", 9).keys == []
        shard.pass_time(2.0)


@pytest.mark.parametrize("order", ["freshest", "arrival", f"{HERE}:odd_groups_first"])
def test_training_in_another_order_gets_what_is_due_when_its_choice_is_refused(direct_shard: Make, order: str) -> None:
    spec = ConsumerSpec(columns=("tokens", "advantage"), training=True, order=order)
    shard = direct_shard(batch_rows=2, max_staleness=1, consumers={**CONSUMERS, "train": spec})
    shard.announce("p", 0)
    groups = shard.reserve(groups=4)
    fill(shard, groups[:2])
    assert shard.take("train", 2, update=0).closed
    shard.announce("p", 1)
    fill(shard, shard.reserve(groups=2))
    fill(shard, groups[2:])
    versions: list[int] = []
    while len(versions) < 2:
        versions += shard.take("train", 2, update=1).versions
    assert versions == [0, 0], "whatever comes first in this order, these are due"
    assert shard.take("train", 2, update=2).versions == [1, 1]


def test_freshest_first_takes_the_youngest_that_leaves_room(direct_shard: Make) -> None:
    spec = ConsumerSpec(columns=("tokens", "advantage"), training=True, order="freshest")
    shard = direct_shard(batch_rows=2, max_staleness=2, consumers={**CONSUMERS, "train": spec})
    shard.announce("p", 0)
    fill(shard, shard.reserve(groups=3))
    assert shard.take("train", 2, update=0).closed
    shard.announce("p", 1)
    fill(shard, shard.reserve(groups=2))
    assert shard.take("train", 1, update=1).versions == [1]
    assert sorted(shard.take("train", 2, update=1).versions) in ([0], [1])


# The last update


def test_last_update_closes_short_and_takes_for_it_end(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=4)
    shard.announce("p", 0)
    keys = fill(shard, shard.reserve(groups=2))
    assert shard.take("train", 4, update=0).keys == keys
    number = shard.take("train", 4, update=0, wait_s=9.0)
    for _ in range(2):
        assert shard.ask(wire.CloseUpdate, 0, 0) == wire.Done(shard_number(shard), 1)
    assert shard.answer_to(number).closed
    assert shard.clock.snapshot().version == 1


def shard_number(shard: Any) -> int:
    """Of the last request."""
    return next(shard._ids) - 1


def test_update_with_rows_outstanding_that_are_due_does_not_close(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=4)
    shard.announce("p", 0)
    assert "with 0 rows" in shard.ask(wire.CloseUpdate, 0, 0).message, "an empty update is none"
    groups = shard.reserve(groups=3)
    fill(shard, groups[:2])
    assert len(shard.take("train", 4, update=0).keys) == 2
    refused = shard.ask(wire.CloseUpdate, 0, 0)
    assert (refused.error, "update: 0" in refused.message) == ("RowRefused", True)
    shard.ask(wire.Drop, groups[2].keys, "the run ends")
    assert shard.ask(wire.CloseUpdate, 0, 0).count == 1
    assert shard.clock.accounts.outstanding == {}


def test_short_close_keeps_the_bound_for_what_is_due_later(direct_shard: Make) -> None:
    shard = direct_shard(batch_rows=2, max_staleness=2)
    shard.announce("p", 0)
    groups = shard.reserve(groups=6)
    fill(shard, groups)
    assert len(shard.take("train", 1, update=0).keys) == 1
    assert shard.ask(wire.CloseUpdate, 0, 0).error == "RowRefused", "five rows due by 2 do not fit into two updates"
    shard.ask(wire.Drop, groups[-1].keys, "the run ends")
    assert shard.ask(wire.CloseUpdate, 0, 0).count == 1
    assert [shard.take("train", 2, update=update).closed for update in (1, 2)] == [True, True]


def test_client_closes_the_last_update_while_another_waits_for_it(serve: Make, connect: Make) -> None:
    server = serve()
    client = connect(server.endpoint)
    client.announce("p", 0)
    keys = keys_of(client.reserve("p", 3, 1))
    all_columns(client, keys, 0)
    assert len(client.take("train", 3, update=0).rows) == 3
    with QueueClient(server.endpoint) as other:
        timer = threading.Timer(0.2, client_closes, (server.endpoint,))
        timer.start()
        assert other.take("train", 1, update=0, wait_s=20.0).closed
        timer.join()
    with pytest.raises(Exception, match="update: 1 of incarnation 0 cannot end short"):
        client.close_update(0, 1)


def client_closes(endpoint: str) -> None:
    with QueueClient(endpoint) as client:
        client.close_update(0, 0)


# Mistakes


@pytest.mark.parametrize(
    ("find", "name", "words"),
    [
        (late_policy, "sometimes", "late: 'sometimes'; must be one of wait, drop"),
        (late_policy, "no.such.module:f", "late: .*no module named 'no'"),
        (late_policy, f"{HERE}:nothing", "late: .*has no 'nothing'"),
        (late_policy, f"{HERE}:HERE", "late: .*must be a function"),
        (order_policy, "random", "order: 'random'; must be one of deadline, freshest, arrival"),
    ],
)
def test_policy_that_is_none_is_refused_by_name(find: Callable[[str], Any], name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        find(name)


def test_shard_with_such_a_policy_is_refused_before_it_starts(direct_shard: Make) -> None:
    with pytest.raises(ValueError, match="late: 'sometimes'"):
        direct_shard(late="sometimes")
    with pytest.raises(ValueError, match="order: 'sideways'"):
        ConsumerSpec(columns=("tokens",), order="sideways")


def test_policy_that_drops_what_it_was_not_shown_is_named() -> None:
    blocker = Blocker(group=1, attempt=0, deadline=3, num_rows=2, num_unready=1, age_s=0.0)
    stranger = Blocker(group=2, attempt=0, deadline=3, num_rows=2, num_unready=1, age_s=0.0)
    with pytest.raises(ValueError, match=r"late: .*must be some of the blockers"):
        choose_late(lambda blockers: [stranger], [blocker])
    with pytest.raises(ValueError, match=r"late: .*each once"):
        choose_late(lambda blockers: [*blockers, *blockers], [blocker])
