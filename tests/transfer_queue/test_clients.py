"""Both faces of the client against live shards: every test runs twice."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transfer_queue.client import QueueClient
from transfer_queue.clock import LocalClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.errors import DuplicateRow, QueueClosed, QueueTimeout, RowRefused, StaleIncarnation
from transfer_queue.rows import Column
from transfer_queue.staleness import Accounts

Make = Callable[..., Any]


def test_rows_go_from_producer_to_trainer_unchanged(serve: Make, connect: Make) -> None:
    client = connect(serve().endpoint)
    client.announce("p", 0)
    groups = client.reserve("p", 9, 2, row_bytes=100)
    keys = [key for group in groups for key in group.keys]
    assert len(keys) == 4
    tokens = Column.ragged([[1], [2, 2], [], [4, 4, 4, 4]], "int32")
    assert client.put(keys, {"tokens": tokens}, versions=[0] * 4) == 4
    rows = client.take("reward", max_rows=9).rows
    assert rows.keys == keys
    assert [row.tolist() for row in rows["tokens"]] == [[1], [2, 2], [], [4, 4, 4, 4]]
    assert client.put(keys, {"reward": Column.scalars([1, 2, 3, 4], "float32")}) == 4
    assert client.ack("reward", keys) == 4
    assert client.take("advantage", max_rows=9).rows["reward"].values.tolist() == [1, 2, 3, 4]
    client.put(keys, {"advantage": Column.scalars([0, 0, 0, 0], "float32")})
    client.ack("advantage", keys)
    taken = client.take("train", max_rows=9, update=0)
    assert (taken.rows.keys, taken.rows.versions, taken.closed) == (keys, [0] * 4, True)
    assert np.shares_memory(taken.rows["tokens"].values, taken.rows["tokens"][1])
    assert taken.rows["tokens"].values.flags.writeable, "tensors are made of it without a copy"
    assert client.commit(0, 0, keys) == 4
    (report,) = client.introspect().values()
    assert (report["stored_rows"], report["clock"]["version"]) == (0, 1)


def test_a_take_acknowledges_rows_of_earlier_ones_by_the_way(serve: Make, connect: Make) -> None:
    client = connect(serve().endpoint)
    client.announce("p", 0)
    keys = [key for group in client.reserve("p", 2, 2) for key in group.keys]
    client.put(keys, {"tokens": Column.scalars([1] * 4, "float32")})
    first = client.take("reward", max_rows=3).rows.keys
    second = client.take("reward", max_rows=3, done=first).rows.keys
    assert (len(first), len(second)) == (3, 1)
    assert (client.ack("reward", first), client.ack("reward", second)) == (0, 1)
    assert len(client.take("reward", done=keys, wait_s=0.0).rows) == 0, "also twice, and in vain"
    with pytest.raises(RowRefused, match="was never ready for 'advantage'"):
        client.take("advantage", done=keys)
    with pytest.raises(RowRefused, match="'train' is training; it commits"):
        client.take("train", update=0, done=keys)


def test_take_in_vain_returns_no_rows_after_its_wait(serve: Make, connect: Make) -> None:
    client = connect(serve().endpoint)
    start = time.monotonic()
    taken = client.take("reward", wait_s=0.2)
    assert (len(taken.rows), taken.closed) == (0, False)
    assert 0.2 <= time.monotonic() - start < 1.0


def test_refusals_are_typed_and_name_the_shard(serve: Make, connect: Make) -> None:
    server = serve()
    client = connect(server.endpoint)
    with pytest.raises(RowRefused, match=f"consumer: 'nobody'.*{server.endpoint}"):
        client.take("nobody")
    client.announce("p", 0)
    (group,) = client.reserve("p", 1, 1)
    client.put(group.keys, {"tokens": Column.scalars([1.0], "float32")})
    with pytest.raises(DuplicateRow, match="other contents"):
        client.put(group.keys, {"tokens": Column.scalars([2.0], "float32")})
    with pytest.raises(RowRefused, match="'tokens' is int32"):
        client.put(group.keys, {"tokens": Column.scalars([2], "int32")})
    with pytest.raises(RowRefused, match="'x' is complex64"):
        client.put(group.keys, {"x": Column(np.zeros(1, "complex64"), np.array([0, 1]))})
    with pytest.raises(ValueError, match="versions: 2 for 1 rows"):
        client.put(group.keys, {"x": Column.scalars([2], "int32")}, versions=[0, 0])


def test_trainer_of_an_earlier_incarnation_is_refused(serve: Make, connect: Make) -> None:
    client = connect(serve(LocalClock(Accounts(4, 0, incarnation=2))).endpoint)
    with pytest.raises(StaleIncarnation, match="incarnation: 1"):
        client.take("train", update=0, incarnation=1)


def test_silent_shard_is_named_in_the_timeout(tmp_path: Path, connect: Make) -> None:
    client = connect(f"ipc://{tmp_path}/nobody", timeout_s=0.2)
    with pytest.raises(QueueTimeout, match=f"ipc://{tmp_path}/nobody"):
        client.announce("p", 0)


def test_closed_client_says_so(serve: Make, connect: Make) -> None:
    client = connect(serve().endpoint)
    client.close()
    with pytest.raises(QueueClosed):
        client.announce("p", 0)


def test_shard_that_ends_tells_those_who_wait(serve: Make, connect: Make) -> None:
    server = serve()
    client = connect(server.endpoint)
    timer = threading.Timer(0.2, server.stop)
    timer.start()
    with pytest.raises(QueueClosed, match="closing"):
        client.take("reward", wait_s=30.0)
    timer.join()


def test_waiting_consumer_delays_nobody(serve: Make, connect: Make) -> None:
    server = serve()

    def wait_in_vain() -> None:
        with QueueClient(server.endpoint) as patient:
            patient.take("advantage", wait_s=1.5)

    waiting = threading.Thread(target=wait_in_vain)
    waiting.start()
    client = connect(server.endpoint)
    start = time.monotonic()
    for version in range(20):
        client.announce("p", version)
    assert time.monotonic() - start < 1.0
    waiting.join()


def test_tcp_with_the_secret_works_and_without_it_does_not(serve: Make, connect: Make) -> None:
    server = serve(endpoint="tcp://127.0.0.1:*", secret="open sesame")
    assert server.endpoint.startswith("tcp://127.0.0.1:")
    connect(server.endpoint, secret="open sesame").announce("p", 0)
    for wrong in ("open barley", ""):
        with pytest.raises(QueueTimeout):
            connect(server.endpoint, secret=wrong, timeout_s=0.3).announce("p", 0)


@pytest.mark.parametrize("endpoint", ["tcp://0.0.0.0:5555", "tcp://*:5555", "tcp://10.0.0.1:5555"])
def test_address_off_loopback_needs_a_secret(endpoint: str, connect: Make) -> None:
    with pytest.raises(ValueError, match="secret: empty"):
        QueueConfig(endpoint=endpoint, consumers={"x": ConsumerSpec(("tokens",))})
    with pytest.raises(ValueError, match="secret: empty"):
        connect(endpoint)
