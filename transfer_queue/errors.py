"""What can go wrong between a client and the queue.

    QueueError
    ├── QueueTimeout       nobody answered in time; the message names the endpoint
    ├── QueueClosed        the server, or this client, has been closed
    ├── WireError          a message that the protocol does not allow
    ├── StaleIncarnation   the trainer that asks has been replaced by a later one
    ├── ShardLost          a shard has died; the trainer must begin a new incarnation
    └── RowRefused         a column, dtype, size, key or group that the ledger refuses, by name
        └── DuplicateRow   the row has that column already, with other contents

This file owns the tree and the way from a name on the wire back to a class; it raises nothing.
"""

from __future__ import annotations


class QueueError(Exception):
    """Every failure of the queue."""


class QueueTimeout(QueueError):
    """Nobody answered in time."""


class QueueClosed(QueueError):
    """The other side, or this one, has been closed."""


class WireError(QueueError):
    """A message that the protocol does not allow."""


class StaleIncarnation(QueueError):
    """The trainer that asks has been replaced by a later one."""


class ShardLost(QueueError):
    """A shard has died, and with it what it held of an update. Nothing more is granted before `begin`."""


class RowRefused(QueueError):
    """The ledger refuses a row, column or group; the message names field, value and rule."""


class DuplicateRow(RowRefused):
    """The row has that column already, with other contents. Who redid a row whose lease was lost may ignore it."""


_KINDS = (QueueTimeout, QueueClosed, WireError, StaleIncarnation, ShardLost, RowRefused, DuplicateRow)
_BY_NAME = {kind.__name__: kind for kind in _KINDS}


def error_named(name: str, message: str) -> QueueError:
    """The error that a peer reported, as an exception of the same class."""
    return _BY_NAME.get(name, QueueError)(message)
