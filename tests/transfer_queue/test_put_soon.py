"""Puts that nobody waits for: what is sent when, and who hears of what the shard refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from transfer_queue.client import QueueClient
from transfer_queue.clock import LocalClock
from transfer_queue.errors import DuplicateRow
from transfer_queue.gathering import GATHER_BYTES, GATHER_ROWS
from transfer_queue.rows import Column
from transfer_queue.staleness import Accounts

Make = Callable[..., Any]
LENGTH = GATHER_BYTES // 4 + 1


@pytest.fixture
def client(serve: Make) -> Iterator[QueueClient]:
    with QueueClient(serve(LocalClock(Accounts(1024, 0))).endpoint) as client:
        client.announce("p", 0)
        yield client


def reserve(client: QueueClient, num_rows: int = 1) -> Any:
    keys: list[Any] = []
    while len(keys) < num_rows:
        for group in client.reserve("p", num_rows - len(keys), 1):
            keys += group.keys
    return keys


def large(value: float, num_rows: int = 1) -> dict[str, Column]:
    """Enough to be sent at once."""
    return {"tokens": Column.ragged([np.full(LENGTH, value)] * num_rows, "float32")}


def small(value: float) -> dict[str, Column]:
    return {"tokens": Column.scalars([value], "float32")}


def ready(client: QueueClient) -> list[float]:
    return [float(row[0]) for row in client.take("reward", 999, wait_s=0.0).rows["tokens"]]


def test_small_ones_are_there_for_the_next_verb(client: QueueClient) -> None:
    for value, key in enumerate(reserve(client, 5)):
        client.put_soon([key], small(value))
    assert ready(client) == [0, 1, 2, 3, 4]


def test_large_ones_are_there_for_the_next_verb_one_after_the_other(client: QueueClient) -> None:
    for value, key in enumerate(reserve(client, 5)):
        client.put_soon([key], large(value))
    assert ready(client) == [0, 1, 2, 3, 4]
    assert client.flush() == 5


def test_flush_counts_what_is_still_wanted_since_the_last_one(client: QueueClient) -> None:
    keys = reserve(client, GATHER_ROWS + 4)
    client.drop(keys[1:3], "not wanted")
    for key in keys:
        client.put_soon([key], small(1))
    assert client.flush() == len(keys) - 2
    assert client.flush() == 0


def test_the_end_of_the_client_waits_for_them(serve: Make) -> None:
    endpoint = serve(LocalClock(Accounts(64, 0))).endpoint
    with QueueClient(endpoint) as client:
        client.announce("p", 0)
        first, second = reserve(client, 2)
        client.put_soon([first], large(1))
        client.put_soon([second], small(2))
    with QueueClient(endpoint) as other:
        assert ready(other) == [1, 2]


def test_the_first_of_a_client_is_there_for_the_next_verb_too(serve: Make) -> None:
    """It does not know the shard yet, and has to ask before it can put."""
    endpoint = serve(LocalClock(Accounts(64, 0))).endpoint
    with QueueClient(endpoint) as client, QueueClient(endpoint) as other:
        client.announce("p", 0)
        other.put_soon(reserve(client), large(3))
        assert ready(other) == [3]


def test_what_is_refused_is_raised_once_by_a_later_one_and_nothing_else_is_lost(client: QueueClient) -> None:
    keys = reserve(client, 3)
    client.put(keys[:1], large(1))
    client.put_soon(keys[:1], large(2))
    client.put_soon(keys[1:2], small(3))
    with pytest.raises(DuplicateRow, match="other contents"):
        client.put_soon(keys[2:], large(4))
    assert client.flush() == 2
    assert ready(client) == [1, 3, 4]


def test_what_is_refused_is_raised_before_a_verb_that_would_send_more(client: QueueClient) -> None:
    keys = reserve(client, 2)
    client.put(keys[:1], large(1))
    client.put_soon(keys[:1], large(2))
    client.put_soon(keys[1:], small(3))
    with pytest.raises(DuplicateRow, match="other contents"):
        client.take("reward", 999, wait_s=0.0)
    assert ready(client) == [1, 3]


def test_close_raises_what_is_refused_and_closes(client: QueueClient) -> None:
    keys = reserve(client)
    client.put(keys, large(1))
    client.put_soon(keys, large(2))
    with pytest.raises(DuplicateRow, match="other contents"):
        client.close()
    client.close()


def test_of_several_that_go_together_only_the_refused_one_is_not_put(client: QueueClient) -> None:
    keys = reserve(client, 3)
    client.put(keys[1:2], small(9))
    for value, key in enumerate(keys):
        client.put_soon([key], small(value))
    with pytest.raises(DuplicateRow, match="other contents"):
        client.flush()
    assert ready(client) == [0, 9, 2]
