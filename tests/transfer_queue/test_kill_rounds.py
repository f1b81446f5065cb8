"""Producers and consumers under SIGKILL at random moments, a trainer that counts what it gets.

FLOWRL_KILL_ROUNDS=200 kills that many; FLOWRL_KILL_SEED draws other moments.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.transfer_queue import kill_peers
from tests.transfer_queue.kill_peers import GROUP_SIZE, reward_of, tokens_of
from transfer_queue.client import QueueClient
from transfer_queue.rows import RowKey, Rows

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = int(os.environ.get("FLOWRL_KILL_ROUNDS", "10"))
SEED = int(os.environ.get("FLOWRL_KILL_SEED", "0"))
BATCH_ROWS = 8
MAX_STALENESS = 2
LEASE_S = 0.5
LONGEST_MOMENT_S = 0.15
PATIENCE_S = 60.0
CONSUMERS = {
    "reward": {"columns": ["tokens"]},
    "train": {"columns": ["tokens", "reward"], "training": True},
}


class Peers:
    """One producer and one consumer at a time, each under a name of its own."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["tests.transfer_queue.kill_peers"])
        self._running: dict[str, tuple[str, Any]] = {}
        self._count = 0

    def start(self, role: str) -> None:
        """Returns when it works."""
        self._count += 1
        name = f"{role}{self._count}"
        hears, says = self._context.Pipe(duplex=False)
        main: Callable[..., None] = {"producer": kill_peers.produce, "consumer": kill_peers.consume}[role]
        process = self._context.Process(target=main, args=(self._endpoint, name, says), daemon=True)
        process.start()
        says.close()
        assert hears.poll(PATIENCE_S), f"{name} did not start"
        hears.recv()
        hears.close()
        self._running[role] = (name, process)

    def kill(self, role: str) -> str:
        """Its name."""
        name, process = self._running.pop(role)
        process.kill()
        process.join(PATIENCE_S)
        assert process.exitcode == -9, f"{name} had ended by itself: {process.exitcode}"
        process.close()
        return name

    def close(self) -> None:
        for role in list(self._running):
            self._running.pop(role)[1].kill()


class Trainer:
    """Trains updates and holds every row against what it must be."""

    def __init__(self, client: QueueClient) -> None:
        self.update = 0
        self._client = client
        self.seen: set[tuple[int, int]] = set()

    def train(self) -> None:
        """One update, whole; fails if it does not fill."""
        keys: list[RowKey] = []
        while True:
            taken = self._client.take("train", BATCH_ROWS, update=self.update, wait_s=PATIENCE_S)
            assert len(taken.rows) or taken.closed, f"update {self.update} has {len(keys)} rows and waits in vain"
            self.check(taken.rows)
            keys += taken.rows.keys
            if taken.closed:
                break
        assert len(keys) == BATCH_ROWS
        assert self._client.commit(0, self.update, keys) == BATCH_ROWS
        self.update += 1

    def check(self, rows: Rows) -> None:
        sizes = Counter((key.group, key.attempt) for key in rows.keys)
        assert set(sizes.values()) <= {GROUP_SIZE}, f"a group was split: {rows.keys}"
        for at, key in enumerate(rows.keys):
            assert (key.group, key.index) not in self.seen, f"{key} was trained twice"
            self.seen.add((key.group, key.index))
            assert 0 <= self.update - rows.versions[at] <= MAX_STALENESS
            assert np.array_equal(rows["tokens"][at], tokens_of(key)), f"{key} is torn"
            assert rows["reward"][at][0] == reward_of(tokens_of(key))


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    settings = {
        "endpoint": f"ipc://{tmp_path}/shard", "consumers": CONSUMERS, "byte_limit": 64 << 20, "lease_s": LEASE_S,
        "batch_rows": BATCH_ROWS, "max_staleness": MAX_STALENESS, "segment_dir": str(tmp_path / "segments"),
    }  # fmt: skip
    (tmp_path / "queue.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "transfer_queue.cli", "serve", "--config", str(tmp_path / "queue.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving ")
        yield f"ipc://{tmp_path}/shard"
        process.terminate()
        assert process.wait(30) == 0
    assert not list((tmp_path / "segments").iterdir()), "nothing is left in memory"


@pytest.mark.timeout(120 + 5 * ROUNDS)
def test_whoever_is_killed_every_row_is_trained_once_and_whole(endpoint: str) -> None:
    dice = random.Random(SEED)
    killed: Counter[str] = Counter()
    with ExitStack() as stack:
        client = stack.enter_context(QueueClient(endpoint, timeout_s=PATIENCE_S))
        peers = Peers(endpoint)
        stack.callback(peers.close)
        trainer = Trainer(client)
        for role in ("producer", "consumer"):
            peers.start(role)
        for _ in range(ROUNDS):
            victim = dice.choice(("producer", "consumer"))
            time.sleep(dice.random() * LONGEST_MOMENT_S)
            name = peers.kill(victim)
            killed[victim] += 1
            if victim == "producer":
                client.producer_lost(name)
            elif dice.random() < 0.5:
                client.consumer_lost(name)  # otherwise its lease ends by itself
            peers.start(victim)
            for _ in range(dice.randrange(1, 3)):
                trainer.train()
        for role in ("consumer", "producer"):
            name = peers.kill(role)
            (client.producer_lost if role == "producer" else client.consumer_lost)(name)
        finish(client, trainer)
        report = client.introspect()[endpoint]
    assert set(killed) == {"producer", "consumer"} or ROUNDS < 5
    assert set(report["ended"]) <= {"producer_lost", "undelivered"}, f"{report['ended']}: nothing else may end a row"
    assert (report["stored_rows"], report["stored_bytes"], report["promised_bytes"]) == (0, 0, 0)
    assert report["partitions"]["train"]["outstanding"] == {}
    assert report["consumers"]["train"]["done"] == len(trainer.seen)
    print(f"{ROUNDS} rounds, {dict(killed)} killed, {trainer.update} updates, {report['ended']}")


def finish(client: QueueClient, trainer: Trainer) -> None:
    """What is whole is trained as far as it fills updates; the rest is dropped."""
    kill_peers.drain(client)
    while True:
        (report,) = client.introspect().values()
        if report["consumers"]["train"]["ready"] < BATCH_ROWS:
            break
        trainer.train()
    rest = client.take("train", BATCH_ROWS, update=trainer.update, wait_s=0.0).rows
    if len(rest):
        trainer.check(rest)
        client.commit(0, trainer.update, rest.keys)
