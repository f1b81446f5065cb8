"""Streams rows between processes, under a staleness bound. numpy, pyzmq and msgspec; no RL, no torch.

A shard is a `QueueServer` (it owns a ledger, storage and a `Clock`); producers and consumers speak with one or several
through a `QueueClient` or an `AsyncQueueClient`.
"""

from transfer_queue.async_client import AsyncQueueClient
from transfer_queue.client import QueueClient
from transfer_queue.clock import Clock, LocalClock, RemoteClock
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.errors import (
    DuplicateRow,
    QueueClosed,
    QueueError,
    QueueTimeout,
    RowRefused,
    StaleIncarnation,
    WireError,
)
from transfer_queue.rows import Column, RowKey, Rows
from transfer_queue.server import QueueServer
from transfer_queue.spans import Keys
from transfer_queue.staleness import Accounts
from transfer_queue.verbs import Taken
from transfer_queue.wire import Reservation

__all__ = [
    "Accounts",
    "AsyncQueueClient",
    "Clock",
    "Column",
    "ConsumerSpec",
    "DuplicateRow",
    "Keys",
    "LocalClock",
    "QueueClient",
    "QueueClosed",
    "QueueConfig",
    "QueueError",
    "QueueServer",
    "QueueTimeout",
    "RemoteClock",
    "Reservation",
    "RowKey",
    "RowRefused",
    "Rows",
    "StaleIncarnation",
    "Taken",
    "WireError",
]
