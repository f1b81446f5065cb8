"""Shard, producers and consumers in processes of their own, some of which are killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from transfer_queue.client import QueueClient
from transfer_queue.rows import Column

Start = Callable[..., subprocess.Popen[str]]
ROOT = Path(__file__).resolve().parents[2]
PEER = Path(__file__).with_name("peer.py")


@pytest.fixture
def start() -> Iterator[Start]:
    with ExitStack() as stack:

        def run(role: str, endpoint: str) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, str(PEER), role, endpoint],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                    env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
                )
            )
            stack.callback(process.kill)
            return process

        yield run


@pytest.fixture
def shard(start: Start, tmp_path: Path) -> subprocess.Popen[str]:
    process = start("shard", f"ipc://{tmp_path}/shard")
    assert heard(process) == "ready"
    return process


@pytest.fixture
def client(shard: subprocess.Popen[str], tmp_path: Path) -> Iterator[QueueClient]:
    with QueueClient(f"ipc://{tmp_path}/shard", timeout_s=10.0) as client:
        client.announce("p", 0)
        yield client


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(10)


def tokens(count: int) -> dict[str, Column]:
    return {"tokens": Column.scalars([0.0] * count, "float32")}


def test_rows_of_a_killed_consumer_are_delivered_again(client: QueueClient, start: Start, tmp_path: Path) -> None:
    keys = [key for group in client.reserve("p", 4, 1) for key in group.keys]
    client.put(keys, tokens(4), versions=[0] * 4)
    doomed = start("consumer", f"ipc://{tmp_path}/shard")
    assert heard(doomed) == "4"
    kill(doomed)
    assert client.take("reward", 9, wait_s=0.0).rows.keys == []
    assert client.take("reward", 9, wait_s=5.0).rows.keys == keys
    client.ack("reward", keys)
    (report,) = client.introspect().values()
    assert report["consumers"]["reward"]["redelivered"] == 4
    assert report["consumers"]["reward"]["done"] == 4


def test_groups_of_a_killed_producer_are_produced_by_another(client: QueueClient, start: Start, tmp_path: Path) -> None:
    doomed = start("producer", f"ipc://{tmp_path}/shard")
    assert heard(doomed) == "4"
    kill(doomed)
    assert client.reserve("p", 4, 1, wait_s=0.0) == []
    assert client.producer_lost("doomed") == 3
    again = client.reserve("p", 4, 1, wait_s=5.0)
    assert [(group.group, group.attempt) for group in again] == [(1, 1), (2, 1), (3, 1)]
    keys = [key for group in again for key in group.keys]
    client.put(keys, tokens(3), versions=[0] * 3)
    rows = client.take("reward", 9).rows
    assert sorted(key.group for key in rows.keys) == [0, 1, 2, 3]
    client.put(rows.keys, {"reward": Column.scalars([1.0] * 4, "float32")})
    client.ack("reward", rows.keys)
    taken = client.take("train", 4, update=0)
    assert (len(taken.rows), taken.closed) == (4, True)


def test_row_for_a_killed_waiter_goes_to_the_next_without_a_lease(
    client: QueueClient, start: Start, tmp_path: Path
) -> None:
    doomed = start("waiter", f"ipc://{tmp_path}/shard")
    assert heard(doomed) == "waiting"
    until = time.monotonic() + 10.0
    while not next(iter(client.introspect().values()))["waiters"]:
        assert time.monotonic() < until, "the waiter never arrived"
    kill(doomed)
    (group,) = client.reserve("p", 1, 1)
    client.put(group.keys, tokens(1), versions=[0])
    assert client.take("reward", 1, wait_s=5.0).rows.keys == list(group.keys)


def test_shard_ends_when_the_pipe_of_its_parent_does(shard: subprocess.Popen[str]) -> None:
    assert shard.stdin is not None
    shard.stdin.close()
    assert heard(shard) == "ended"
    assert shard.wait(10) == 0
