"""Streams rows between processes, under a staleness bound. numpy, pyzmq and msgspec; no RL, no torch.

A shard is a `QueueServer` (it owns a ledger, storage and a `Clock`); producers and consumers speak with one or several
through a `QueueClient` or an `AsyncQueueClient`. Several shards share the `Accounts` of one `ClockServer`.
"""

from transfer_queue.async_client import AsyncQueueClient
from transfer_queue.client import QueueClient
from transfer_queue.clock import Clock, LocalClock, RemoteClock
from transfer_queue.clock_server import ClockServer
from transfer_queue.config import ConsumerSpec, QueueConfig
from transfer_queue.cursor import Cursor, cursor_of
from transfer_queue.errors import (
    DuplicateRow,
    QueueClosed,
    QueueError,
    QueueTimeout,
    RowRefused,
    ShardLost,
    StaleIncarnation,
    WireError,
)
from transfer_queue.rows import Column, RowKey, Rows
from transfer_queue.server import QueueServer
from transfer_queue.spans import Keys
from transfer_queue.staleness import Accounts
from transfer_queue.steps import Taken
from transfer_queue.wire import Reservation

__all__ = [
    "Accounts",
    "AsyncQueueClient",
    "Clock",
    "ClockServer",
    "Column",
    "ConsumerSpec",
    "Cursor",
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
    "ShardLost",
    "StaleIncarnation",
    "Taken",
    "WireError",
    "cursor_of",
]
