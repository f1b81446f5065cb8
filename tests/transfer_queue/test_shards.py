"""Two shards, each on a socket, with one clock behind another."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.transfer_queue.clock_host import clock_host
from transfer_queue.client import QueueClient
from transfer_queue.clock import RemoteClock
from transfer_queue.rows import Column
from transfer_queue.staleness import Accounts

Make = Callable[..., Any]
BATCH_ROWS = 4


@pytest.fixture
def accounts() -> Accounts:
    return Accounts(BATCH_ROWS, 1)


@pytest.fixture
def endpoints(serve: Make, tmp_path: Path, accounts: Accounts) -> Iterator[list[str]]:
    """Of two shards; shards stop before the clock does."""
    with clock_host(f"ipc://{tmp_path}/clock", accounts) as host:
        servers = [
            serve(RemoteClock(host.endpoint, f"shard{at}"), f"shard{at}", first_group=at, group_stride=2)
            for at in (0, 1)
        ]
        yield [server.endpoint for server in servers]
        for server in servers:
            server.stop()


def produce(client: Any, num_groups: int, version: int = 0) -> list[Any]:
    """Reserves on the client's first shard and puts all columns."""
    groups: list[Any] = []
    while len(groups) < num_groups:
        more = client.reserve("p", num_groups - len(groups), 1, wait_s=5.0)
        assert more, f"{len(groups)} of {num_groups} groups"
        groups += more
    keys = [key for group in groups for key in group.keys]
    client.put(keys, {"tokens": Column.scalars([0] * len(keys), "float32")}, versions=[version] * len(keys))
    for name in ("reward", "advantage"):
        client.put(keys, {name: Column.scalars([0] * len(keys), "float32")})
    return keys


def test_one_bound_holds_over_all_shards(endpoints: list[str], connect: Make, accounts: Accounts) -> None:
    here, there = connect(endpoints), connect(endpoints[::-1])
    here.announce("p", 0)
    assert len(here.reserve("p", 6, 1)) == 6
    assert len(there.reserve("p", 6, 1, wait_s=5.0)) == 2
    assert there.reserve("p", 1, 1, wait_s=0.1) == []
    here.producer_lost("p")
    here.announce("p", 0)
    assert len(there.reserve("p", 8, 1, wait_s=5.0)) == 8, "what the other shard gave back"
    assert accounts.outstanding == {1: 8}


def test_take_finds_rows_on_other_shards_and_acks_go_home(endpoints: list[str], connect: Make) -> None:
    here, there = connect(endpoints), connect(endpoints[::-1])
    here.announce("p", 0)
    keys = produce(there, 2)
    rows = here.take("reward", 9, wait_s=5.0).rows
    assert sorted(rows.keys) == keys
    assert here.ack("reward", rows.keys) == 2
    assert there.take("reward", 9, wait_s=0.1).rows.keys == []


def test_rows_of_all_shards_are_acknowledged_by_one_take(endpoints: list[str], connect: Make) -> None:
    here, there = connect(endpoints), connect(endpoints[::-1])
    here.announce("p", 0)
    keys = [*produce(here, 2), *produce(there, 2)]
    taken: list[Any] = []
    while len(taken) < len(keys):
        taken += here.take("reward", 9, wait_s=5.0).rows.keys
    assert here.take("reward", 9, wait_s=0.1, done=taken).rows.keys == []
    assert sorted(taken) == sorted(keys) and there.ack("reward", keys) == 0


def test_parked_take_wakes_by_a_put_on_another_shard(endpoints: list[str], connect: Make) -> None:
    here = connect(endpoints)
    here.announce("p", 0)

    def put_there() -> None:
        with QueueClient(endpoints[::-1]) as there:
            produce(there, 1)

    timer = threading.Timer(0.2, put_there)
    timer.start()
    assert len(here.take("reward", 9, wait_s=10.0).rows) == 1
    timer.join()


def test_updates_fill_from_both_shards_until_closed(endpoints: list[str], connect: Make, accounts: Accounts) -> None:
    here, there = connect(endpoints), connect(endpoints[::-1])
    for update in range(6):
        here.announce("p", update)
        produce(here, 2, update)
        produce(there, 2, update)
        keys: list[Any] = []
        closed = False
        while not closed:
            taken = here.take("train", 3, update=update, wait_s=5.0)
            assert taken.closed or len(taken.rows), "the update did not fill"
            keys += taken.rows.keys
            closed = taken.closed
        assert len(keys) == len(set(keys)) == BATCH_ROWS
        assert here.commit(0, update, keys) == BATCH_ROWS
    assert (accounts.version, accounts.outstanding) == (6, {})
