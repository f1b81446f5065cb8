"""Shards in memory, with one clock: any of them is killed at a random moment, or joins later. Everything in processes.

FLOWRL_KILL_ROUNDS=200 kills a quarter as many shards.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from transfer_queue import Column, Cursor, QueueClient, QueueError, RowKey, ShardLost, cursor_of

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = max(3, int(os.environ.get("FLOWRL_KILL_ROUNDS", "10")) // 4)
SEED = int(os.environ.get("FLOWRL_KILL_SEED", "0"))
BATCH_ROWS, MAX_STALENESS, GROUP_SIZE = 8, 2, 2
TIMEOUT_S = 1.0
CONSUMERS = {"train": {"columns": ["tokens"], "training": True}}


class Served:
    """A process of `transfer-queue`, once it serves."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "transfer_queue.cli", *arguments]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
        assert self._process.stdout is not None
        assert self._process.stdout.readline().startswith(("serving ", "clock at "))

    def close(self) -> None:
        """By SIGKILL."""
        with self._process:
            self._process.kill()


class Fleet:
    """A clock and shards 0 to 2, of which some are there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._clock = Served(
            "clock", "--endpoint", f"ipc://{folder}/clock", "--batch-rows", str(BATCH_ROWS),
            "--max-staleness", str(MAX_STALENESS),
        )  # fmt: skip
        self.shards: dict[int, Served] = {}
        self.lives = [0, 0, 0]

    def start(self, at: int, cursor: Cursor | None = None) -> None:
        settings: dict[str, Any] = {
            "consumers": CONSUMERS, "byte_limit": 16 << 20, "life": self.lives[at],
            "segment_dir": str(self._folder / "segments"),
        }  # fmt: skip
        if cursor is not None:
            settings["cursors"] = {"train": {"end": cursor.end, "open": cursor.open, "group_size": cursor.group_size}}
        config = self._folder / f"shard{at}.json"
        config.write_text(json.dumps(settings))
        self.shards[at] = Served(
            "serve", "--config", str(config), "--endpoint", self._address(at), "--shard", f"{at}/3",
            "--clock", f"ipc://{self._folder}/clock",
        )  # fmt: skip
        self.lives[at] += 1

    def kill(self, at: int) -> None:
        self.shards.pop(at).close()

    def client(self, first: int | None = None) -> QueueClient:
        there = sorted(self.shards, key=lambda at: (at != first, at))
        return QueueClient([self._address(at) for at in there], timeout_s=TIMEOUT_S)

    def close(self) -> None:
        for served in (*self.shards.values(), self._clock):
            served.close()

    def _address(self, at: int) -> str:
        return f"ipc://{self._folder}/shard{at}"


class Producer(threading.Thread):
    """Fills one shard as long as that lives and it is not told to stop."""

    def __init__(self, fleet: Fleet, at: int) -> None:
        super().__init__()
        self._fleet = fleet
        self._at = at
        self._ends = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ends.is_set() and self._at in self._fleet.shards:
            try:
                with self._fleet.client(self._at) as client:
                    client.producer_lost(f"p{self._at}")  # what it had reserved when its last client gave up
                    while not self._ends.is_set():
                        self._produce(client)
            except QueueError:
                """A shard is dead, its own or another that it tells of its version, or only slow."""

    def _produce(self, client: QueueClient) -> None:
        version = max(report["clock"]["version"] for report in client.introspect().values())
        client.announce(f"p{self._at}", version)
        for group in client.reserve(f"p{self._at}", 2, GROUP_SIZE, row_bytes=64, wait_s=0.05):
            tokens = [[key.group, key.index, key.attempt] for key in group.keys]
            client.put(group.keys, {"tokens": Column.ragged(tokens, "int32")}, [max(version, group.version)] * 2)

    def stop(self) -> None:
        self._ends.set()
        self.join()


class Trainer:
    """Knows which groups are trained, and after every update which are open."""

    def __init__(self) -> None:
        self.update = 0
        self.incarnation = 0
        self.trained: set[int] = set()
        self.cursor = Cursor()

    def train(self, client: QueueClient) -> None:
        keys: list[RowKey] = []
        closed = False
        while not closed:
            taken = client.take("train", BATCH_ROWS, update=self.update, incarnation=self.incarnation, wait_s=20.0)
            assert len(taken.rows) or taken.closed, (
                f"update {self.update} has {len(keys)} rows and waits in vain: {client.introspect()}"
            )
            for at, key in enumerate(taken.rows.keys):
                assert taken.rows["tokens"][at].tolist() == [key.group, key.index, key.attempt]
                assert 0 <= self.update - taken.rows.versions[at] <= MAX_STALENESS
            keys += taken.rows.keys
            closed = taken.closed
        if len(keys) < BATCH_ROWS:
            raise QueueError("the update has lost rows with a shard")
        groups = [key.group for key in keys[::GROUP_SIZE]]
        assert len(set(keys)) == BATCH_ROWS and sorted(groups * 2) == sorted(key.group for key in keys)
        assert not self.trained & set(groups), "no group is trained twice"
        self.trained |= set(groups)
        self.update += 1
        client.commit(self.incarnation, self.update - 1, keys)
        self.cursor = cursor_of(report["partitions"]["train"] for report in client.introspect().values())

    def begin(self, client: QueueClient, lost: list[str]) -> None:
        self.incarnation += 1
        client.begin(self.incarnation, self.update, lost)


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    with closing(Fleet(tmp_path)) as fleet:
        yield fleet


@pytest.mark.slow
@pytest.mark.timeout(60 + 20 * ROUNDS)
def test_rows_of_a_killed_shard_are_lost_and_come_again_and_no_other_row_does(fleet: Fleet) -> None:
    dice = random.Random(SEED)
    trainer = Trainer()
    for at in range(3):
        fleet.start(at)
    for _ in range(ROUNDS):
        victim = dice.randrange(3)
        killer = threading.Timer(dice.random() * 0.3, fleet.kill, [victim])
        with ExitStack() as stack:
            client = stack.enter_context(fleet.client())
            for at in fleet.shards:
                stack.callback(Producer(fleet, at).stop)
            killer.start()
            with pytest.raises(QueueError):
                while True:
                    trainer.train(client)
        killer.join()
        fleet.start(victim, trainer.cursor.without(trainer.trained))
        with fleet.client() as client:
            trainer.begin(client, [])
            for at in range(3):
                client.producer_lost(f"p{at}")
    with ExitStack() as stack:
        client = stack.enter_context(fleet.client())
        for at in fleet.shards:
            stack.callback(Producer(fleet, at).stop)
        end = trainer.update + 3 * MAX_STALENESS
        while trainer.update < end:
            try:
                trainer.train(client)
            except ShardLost:  # the new shard was heard of after the trainer had begun
                trainer.begin(client, [])
    assert sorted(trainer.trained) == sorted(set(range(trainer.cursor.end)) - set(trainer.cursor.open))
    print(f"{ROUNDS} shards killed, {trainer.update} updates, {len(trainer.trained)} groups trained once each")


def test_a_shard_that_leaves_for_good_is_not_waited_for_and_one_that_joins_takes_part(fleet: Fleet) -> None:
    trainer = Trainer()
    for at in (0, 1):
        fleet.start(at)
    with fleet.client() as client, closing_all(Producer(fleet, 0), Producer(fleet, 1)):
        trainer.train(client)
    fleet.kill(1)
    with fleet.client() as client:
        client.producer_lost("p0")
        trainer.begin(client, ["shard-1"])
        with closing_all(Producer(fleet, 0)):
            trainer.train(client)
    fleet.start(2)
    with fleet.client() as client, closing_all(Producer(fleet, 0), Producer(fleet, 2)):
        deadline_s = time.monotonic() + 30.0
        while not any(group % 3 == 2 for group in trainer.trained) and time.monotonic() < deadline_s:
            trainer.train(client)
    assert any(group % 3 == 2 for group in trainer.trained), "the shard that joined gives rows"


def closing_all(*producers: Producer) -> ExitStack:
    stack = ExitStack()
    for producer in producers:
        stack.callback(producer.stop)
    return stack
