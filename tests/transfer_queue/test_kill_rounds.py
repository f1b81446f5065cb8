"""Producers, consumers and shards under SIGKILL at random moments, a trainer that counts what it gets.

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
from contextlib import ExitStack, closing
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
        self._running: dict[str, tuple[str, Any, Any]] = {}
        self._count = 0
        self.committed: set[tuple[int, int]] = set()

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
        self._running[role] = (name, process, hears)

    def kill(self, role: str) -> str:
        """Its name."""
        name, process, hears = self._running.pop(role)
        process.kill()
        process.join(PATIENCE_S)
        self._listen(hears)
        hears.close()
        assert process.exitcode == -9, f"{name} had ended by itself: {process.exitcode}"
        process.close()
        return name

    def listen(self) -> None:
        """What producers say, before their pipes are full."""
        for _, _, hears in self._running.values():
            self._listen(hears)

    def _listen(self, hears: Any) -> None:
        try:
            while hears.poll():
                self.committed.add(hears.recv())
        except EOFError:
            return

    def close(self) -> None:
        for role in list(self._running):
            _, process, hears = self._running.pop(role)
            process.kill()
            process.join(PATIENCE_S)
            hears.close()


class Trainer:
    """Trains updates and holds every row against what it must be."""

    def __init__(self, client: QueueClient) -> None:
        self.update = 0
        self.client = client
        self.seen: set[tuple[int, int]] = set()
        self.groups: set[tuple[int, int]] = set()

    def train(self) -> None:
        """One update, whole; fails if it does not fill."""
        keys: list[RowKey] = []
        while True:
            taken = self.client.take("train", BATCH_ROWS, update=self.update, wait_s=PATIENCE_S)
            assert len(taken.rows) or taken.closed, f"update {self.update} has {len(keys)} rows and waits in vain"
            self.check(taken.rows)
            keys += taken.rows.keys
            if taken.closed:
                break
        assert len(keys) == BATCH_ROWS
        assert self.client.commit(0, self.update, keys) == BATCH_ROWS
        self.update += 1

    def check(self, rows: Rows) -> None:
        sizes = Counter((key.group, key.attempt) for key in rows.keys)
        assert set(sizes.values()) <= {GROUP_SIZE}, f"a group was split: {rows.keys}"
        for at, key in enumerate(rows.keys):
            assert (key.group, key.index) not in self.seen, f"{key} was trained twice"
            self.seen.add((key.group, key.index))
            self.groups.add((key.group, key.attempt))
            assert 0 <= self.update - rows.versions[at] <= MAX_STALENESS
            assert np.array_equal(rows["tokens"][at], tokens_of(key)), f"{key} is torn"
            assert rows["reward"][at][0] == reward_of(tokens_of(key))


class ServedShard:
    """`transfer-queue serve`, which may be killed and started again."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.endpoint = f"ipc://{folder}/shard"
        self._config = folder / "queue.json"
        rest = {
            "endpoint": self.endpoint, "consumers": CONSUMERS, "byte_limit": 64 << 20, "lease_s": LEASE_S,
            "batch_rows": BATCH_ROWS, "max_staleness": MAX_STALENESS,
        }  # fmt: skip
        self._config.write_text(json.dumps(rest | settings))
        self.start()

    def start(self) -> None:
        command = [sys.executable, "-m", "transfer_queue.cli", "serve", "--config", str(self._config)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert self.process.stdout is not None
        assert self.process.stdout.readline().startswith("serving ")

    def kill(self) -> None:
        self.process.kill()
        self.wait()

    def end(self) -> None:
        self.process.terminate()
        assert self.wait() == 0

    def close(self) -> None:
        """After a test that failed."""
        if self.process.poll() is None:
            self.kill()

    def wait(self) -> int:
        try:
            return self.process.wait(PATIENCE_S)
        finally:
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture
def endpoint(tmp_path: Path) -> Iterator[str]:
    shard = ServedShard(tmp_path, segment_dir=str(tmp_path / "segments"))
    with closing(shard):
        yield shard.endpoint
        shard.end()
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
            peers.listen()
        for role in ("consumer", "producer"):
            name = peers.kill(role)
            (client.producer_lost if role == "producer" else client.consumer_lost)(name)
        finish(client, trainer)
        check_end(client, trainer, peers)
    assert set(killed) == {"producer", "consumer"} or ROUNDS < 5
    print(f"{ROUNDS} rounds, {dict(killed)} killed, {trainer.update} updates")


@pytest.mark.timeout(120 + 10 * ROUNDS)
def test_a_shard_on_disk_that_is_killed_loses_no_row_that_was_put(tmp_path: Path) -> None:
    dice = random.Random(SEED + 1)
    shard = ServedShard(tmp_path, durable_dir=str(tmp_path / "durable"))
    with ExitStack() as stack:
        stack.callback(shard.close)
        peers = Peers(shard.endpoint)
        stack.callback(peers.close)
        client = QueueClient(shard.endpoint, timeout_s=PATIENCE_S)
        trainer = Trainer(client)
        for _ in range(max(1, ROUNDS // 2)):
            for role in ("producer", "consumer"):
                peers.start(role)
            for _ in range(dice.randrange(3)):
                trainer.train()
            time.sleep(dice.random() * LONGEST_MOMENT_S)
            shard.kill()
            client.close()
            names = {role: peers.kill(role) for role in ("producer", "consumer")}
            shard.start()
            client = trainer.client = QueueClient(shard.endpoint, timeout_s=PATIENCE_S)
            client.producer_lost(names["producer"])
            client.consumer_lost(names["consumer"])
        finish(client, trainer)
        check_end(client, trainer, peers)
        client.close()
        shard.end()
        print(f"{max(1, ROUNDS // 2)} shards killed, {trainer.update} updates")


def check_end(client: QueueClient, trainer: Trainer, peers: Peers) -> None:
    """Everything that was put has been trained, everything else will come again, and nothing is left."""
    (report,) = client.introspect().values()
    partition = report["partitions"]["train"]
    assert peers.committed <= trainer.groups, f"{peers.committed - trainer.groups} were put and are gone"
    assert set(report["ended"]) <= {"producer_lost", "undelivered"}, f"{report['ended']}: nothing else may end a row"
    assert (report["stored_rows"], report["stored_bytes"], report["promised_bytes"]) == (0, 0, 0), report
    assert partition["outstanding"] == {}, report
    assert partition["next_group"] == len(trainer.groups) + partition["to_reserve_anew"], (
        "every number is accounted for"
    )


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
