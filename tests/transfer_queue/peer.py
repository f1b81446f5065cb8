"""A process of its own for the tests: `peer.py ROLE ENDPOINT`. Says on stdout what it has, then waits to be killed."""

from __future__ import annotations

import sys
import threading

from transfer_queue.client import QueueClient
from transfer_queue.clock import LocalClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.rows import Column
from transfer_queue.server import QueueServer
from transfer_queue.staleness import Accounts


def say(what: object) -> None:
    print(what, flush=True)


def shard(endpoint: str) -> None:
    consumers = {
        "reward": ConsumerSpec(columns=("tokens",)),
        "train": ConsumerSpec(columns=("tokens", "reward"), training=True),
    }
    config = QueueConfig(endpoint=endpoint, consumers=consumers, lease_s=1.0)
    server = QueueServer(config, LocalClock(Accounts(4, 0)))
    say("ready")
    server.serve(sys.stdin)
    server.close()
    say("ended")


def producer(endpoint: str) -> None:
    with QueueClient(endpoint) as client:
        client.announce("doomed", 0)
        groups = client.reserve("doomed", 4, 1)
        client.put(groups[0].keys, {"tokens": Column.scalars([0], "float32")}, versions=[0])
        say(len(groups))
        threading.Event().wait(60)


def consumer(endpoint: str) -> None:
    with QueueClient(endpoint) as client:
        say(len(client.take("reward", 9, wait_s=10.0).rows))
        threading.Event().wait(60)


def waiter(endpoint: str) -> None:
    with QueueClient(endpoint) as client:
        say("waiting")
        client.take("reward", 9, wait_s=60.0)


if __name__ == "__main__":
    {"shard": shard, "producer": producer, "consumer": consumer, "waiter": waiter}[sys.argv[1]](sys.argv[2])
