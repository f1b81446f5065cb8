"""Processes that are killed at random moments: producers in a put, consumers with a lease. Run by test_kill_rounds.py.

A row's contents follow from its key alone, so that whoever gets it can tell whether it is whole.
"""

from __future__ import annotations

import random
from multiprocessing.connection import Connection

import numpy as np

from transfer_queue.client import QueueClient
from transfer_queue.rows import Column, RowKey

GROUP_SIZE = 2
LONGEST = 60_000
ROW_BYTES = 4 * LONGEST + 64


def tokens_of(key: RowKey) -> np.ndarray:
    """int32, of a length between 1 and LONGEST."""
    dice = random.Random(f"{key.group} {key.index} {key.attempt}")
    first = dice.randrange(1 << 20)
    return np.arange(first, first + dice.randrange(1, LONGEST), dtype=np.int32)


def reward_of(tokens: np.ndarray) -> float:
    return float(tokens.sum(dtype=np.int64))


def produce(endpoint: str, name: str, started: Connection) -> None:
    """Reserves and puts, row by row, with the version that the queue is at; says which groups have been put."""
    with QueueClient(endpoint, timeout_s=60.0, name=name) as client:
        started.send(name)
        while True:
            (report,) = client.introspect().values()
            version = report["clock"]["version"]
            client.announce(name, version)
            for group in client.reserve(name, 2, GROUP_SIZE, row_bytes=ROW_BYTES, wait_s=0.2):
                for key in group.keys:
                    columns = {"tokens": Column.ragged([tokens_of(key)], "int32")}
                    client.put([key], columns, versions=[max(version, group.version)])
                started.send((group.group, group.attempt))


def consume(endpoint: str, name: str, started: Connection) -> None:
    """Takes rows and puts their rewards. (What it puts for rows that were lost meanwhile is ignored.)"""
    with QueueClient(endpoint, timeout_s=60.0, name=name) as client:
        started.send(name)
        while True:
            rows = client.take("reward", 3, wait_s=5.0).rows
            if len(rows):
                rewards = [reward_of(tokens) for tokens in rows["tokens"]]
                client.put(rows.keys, {"reward": Column.scalars(rewards, "float64")})
                client.ack("reward", rows.keys)


def drain(client: QueueClient) -> None:
    """All rows that wait for a reward get it."""
    while len(rows := client.take("reward", 64, wait_s=1.0).rows):
        rewards = [reward_of(tokens) for tokens in rows["tokens"]]
        client.put(rows.keys, {"reward": Column.scalars(rewards, "float64")})
        client.ack("reward", rows.keys)
