"""A shard with its rows on disk is killed and started again: nothing is lost, nothing is counted twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfer_queue import Accounts, ConsumerSpec, LocalClock, QueueConfig, QueueServer
from transfer_queue.client import QueueClient
from transfer_queue.journal import FILE, Journal
from transfer_queue.records import ClockRecord, GoneRecord
from transfer_queue.rows import Column, RowKey

ROOT = Path(__file__).resolve().parents[2]
SHARD = """
import sys
from transfer_queue import Accounts, ConsumerSpec, LocalClock, QueueConfig, QueueServer
consumers = {
    "reward": ConsumerSpec(columns=("tokens",)),
    "train": ConsumerSpec(columns=("tokens", "reward"), training=True),
}
config = QueueConfig(endpoint=sys.argv[1], consumers=consumers, durable_dir=sys.argv[2], byte_limit=1 << 28)
server = QueueServer(config, LocalClock(Accounts(4, 2)))
print("ready", flush=True)
server.serve(sys.stdin)
server.close()
"""


class DurableShard:
    """A shard in a process of its own, at one address and in one directory in all its lives."""

    def __init__(self, directory: Path) -> None:
        self.endpoint = f"ipc://{directory}/socket"
        self.rows = directory / "rows"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", SHARD, self.endpoint, str(self.rows)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"ready\n"

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        with self._process:
            self._process.wait(10)
        self._process = None

    def close(self) -> None:
        if self._process is not None:
            self.kill()


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[DurableShard]:
    made = DurableShard(tmp_path)
    made.start()
    yield made
    made.close()


@pytest.fixture
def client(shard: DurableShard) -> Iterator[QueueClient]:
    with QueueClient(shard.endpoint, timeout_s=10.0) as client:
        client.announce("p", 0)
        yield client


def payload(keys: list[RowKey] | tuple[RowKey, ...]) -> dict[str, Column]:
    return {"tokens": Column.ragged([[key.group, key.index] * (1 + key.index) for key in keys], "int64")}


def restart(shard: DurableShard) -> None:
    shard.kill()
    shard.start()


def test_rows_states_and_claims_outlive_the_shard(shard: DurableShard, client: QueueClient) -> None:
    groups = client.reserve("p", 3, 2)
    done, ready, half = (list(group.keys) for group in groups)
    client.put(done + ready, payload(done + ready), [0] * 4)
    client.put(half[:1], payload(half[:1]), [0])
    client.take("reward", 4)
    client.ack("reward", done)
    client.put(done, {"reward": Column.scalars([1.0, 2.0], "float32")})
    assert client.take("train", 2, update=0).rows.keys == done
    restart(shard)
    with QueueClient(shard.endpoint) as other:
        again = other.take("reward", 9).rows
        assert sorted(again.keys) == sorted([*ready, half[0]]), "the acknowledged ones do not come again"
        assert [list(row) for row in again["tokens"]] == [list(row) for row in payload(again.keys)["tokens"]]
        other.announce("p", 0)
        other.put(half[1:], payload(half[1:]), [0])
        other.ack("reward", ready + half[:1])
        other.put(ready, {"reward": Column.scalars([3.0, 4.0], "float32")})
        mine = other.take("train", 4, update=0)
        assert (mine.rows.keys, mine.closed) == (ready, True), "what another client has taken is not given twice"
    assert client.commit(0, 0, done + ready) == 4
    assert client.introspect()[shard.endpoint]["clock"]["version"] == 1


def test_half_a_group_whose_producer_died_with_the_shard_leaves_nothing(
    shard: DurableShard, client: QueueClient
) -> None:
    (group,) = client.reserve("p", 1, 2, row_bytes=64)
    client.put(group.keys[:1], payload(group.keys[:1]), [0])
    restart(shard)
    with QueueClient(shard.endpoint) as other:
        assert other.producer_lost("p") == 1
        (report,) = other.introspect().values()
        assert (report["stored_rows"], report["stored_bytes"], report["promised_bytes"]) == (0, 0, 0)


def test_a_client_that_may_not_have_heard_is_told_again_and_counts_once(
    shard: DurableShard, client: QueueClient
) -> None:
    (group,) = client.reserve("p", 1, 2)
    client.put(group.keys, payload(group.keys) | {"reward": Column.scalars([0.0, 1.0], "float32")}, [0, 0])
    taken = client.take("train", 2, update=0).rows
    assert taken.keys == list(group.keys)
    restart(shard)
    assert client.take("train", 2, update=0, wait_s=0.1).rows.keys == [], "it has them"
    assert client.commit(0, 0, taken.keys) == 2


def test_a_torn_tail_of_the_journal_is_cut_off(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([ClockRecord(1, 2, 3), ClockRecord(4, 5, 6)])
    journal.close()
    whole = (tmp_path / FILE).read_bytes()
    for end in range(len(whole)):
        (tmp_path / FILE).write_bytes(whole[:end])
        again = Journal(tmp_path)
        first = len(whole) // 2
        assert again.past.clock == (ClockRecord(1, 2, 3) if end >= first else None)
        again.append([ClockRecord(7, 8, 9)])
        again.close()
        assert Journal(tmp_path).past.clock == ClockRecord(7, 8, 9)
    (tmp_path / FILE).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert Journal(tmp_path).past.clock == ClockRecord(1, 2, 3)


def test_rewriting_the_journal_forgets_history_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.append([ClockRecord(1, 2, 3)] * 1000)
    journal.rewrite([ClockRecord(1, 2, 3)])
    journal.append([GoneRecord("train", 0, 0), ClockRecord(2, 0, 3)])
    journal.close()
    assert (tmp_path / FILE).stat().st_size < 100
    assert Journal(tmp_path).past.clock == ClockRecord(2, 0, 3)


def test_a_torn_segment_loses_its_groups_and_they_are_reserved_anew(shard: DurableShard, client: QueueClient) -> None:
    torn, sound = client.reserve("p", 2, 2)
    client.put(torn.keys, payload(torn.keys), [0, 0])
    with QueueClient(shard.endpoint) as other:
        other.put(sound.keys, payload(sound.keys), [0, 0])
    shard.kill()
    (segment,) = shard.rows.glob("1.*")
    with segment.open("r+b") as file:
        file.seek(64)
        file.write(b"\xff")
    shard.start()
    client.announce("p", 0)
    assert client.take("reward", 9).rows.keys == list(sound.keys)
    (again,) = client.reserve("p", 1, 2)
    assert (again.group, again.attempt) == (torn.group, 1)


def test_a_directory_in_use_is_refused_by_name(shard: DurableShard) -> None:
    config = QueueConfig(
        endpoint="tcp://127.0.0.1:*", consumers={"c": ConsumerSpec(columns=("x",))}, durable_dir=str(shard.rows),
        byte_limit=1 << 20,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"durable_dir: .*another shard is using it"):
        QueueServer(config, LocalClock(Accounts(4, 0)))


def test_every_row_is_trained_once_though_the_shard_is_killed_again_and_again(
    shard: DurableShard, client: QueueClient
) -> None:
    """One process plays producer, reward and trainer; the shard dies between two rounds of theirs."""
    dice = random.Random(3)
    trained: list[RowKey] = []
    open_groups: dict[int, list[RowKey]] = {}
    update = kills = 0
    held: list[RowKey] = []
    while update < 12:
        if dice.random() < 0.3:
            restart(shard)
            client.announce("p", update)
            kills += 1
        for group in client.reserve("p", 2, 2, row_bytes=64, wait_s=0.0):
            open_groups[group.group] = list(group.keys)
        for number in list(open_groups):
            keys = open_groups.pop(number)
            client.put(keys, payload(keys), [update] * 2)
        rows = client.take("reward", 8, wait_s=0.0).rows
        if len(rows):
            client.put(rows.keys, {"reward": Column.scalars([1.0] * len(rows), "float32")})
            client.ack("reward", rows.keys)
        taken = client.take("train", 4, update=update, wait_s=0.0)
        held += taken.rows.keys
        if taken.closed or len(held) == 4:
            assert client.commit(0, update, held) <= 4
            trained += held
            held, update = [], update + 1
            client.announce("p", update)
    assert len(trained) == len(set(trained)) == 48
    assert kills > 3
