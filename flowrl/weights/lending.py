"""Between the rank that publishes on a node and the node's other ranks: a buffer to write to, and whether all have.

    lender -> borrowers      LENT: key, live keys (and the open file, the first time); or REFUSED: there is no buffer
    borrowers -> lender      version, whether it is written
    lender -> borrowers      VERDICT: version, the ranks that could not: none, and it becomes visible

A socket that the kernel passes on at once, because what the trainer's ranks say to each other in between counts: for
small models a collective takes as long as the weights.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from array import array
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from flowrl.weights.buffers import map_bytes
from flowrl.weights.mappings import short_path

logger = logging.getLogger(__name__)

_NAME = ".buffers"
_LENT, _REFUSED, _VERDICT = range(3)
_MESSAGE_BYTES = 1 << 16
_TIMEOUT_S = 120.0
_BORROWER_TIMEOUT_S = 600.0
"""Longer, because it includes what the lender waits for: a buffer to be made, other peers."""


class Lent(NamedTuple):
    """A buffer to write the next version to. live: the keys of all there are. file: None if it has been lent before."""

    key: int
    live: Sequence[int]
    file: torch.Tensor | None


class Lender:
    """For the ranks `peers`, through a socket in `root`. Waits for them for two minutes at most."""

    def __init__(self, root: Path, peers: Sequence[int]) -> None:
        self._sockets: dict[int, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.settimeout(_TIMEOUT_S)
        self._peers = peers
        self._lent: set[int] = set()
        self._path = root / _NAME
        self._path.unlink(missing_ok=True)
        with short_path(root, _NAME) as address:
            self._listener.bind(address)
        self._listener.listen(len(peers))

    def send(self, key: int, live: Sequence[int], fd: int) -> None:
        """Raises TimeoutError if a rank has never come. One that has gone will not say that it has written."""
        self._meet()
        fds = [] if key in self._lent else [fd]
        self._send([_LENT, key, *live], fds)
        self._lent = {key, *self._lent.intersection(live)}

    def refuse(self) -> None:
        """There is no buffer for this version."""
        self._meet()
        self._send([_REFUSED], [])

    def failed(self, version: int) -> list[int]:
        """The peers that have not written the version, once all have said so or have gone."""
        deadline = time.monotonic() + _TIMEOUT_S
        return [rank for rank in self._peers if not self._has_written(rank, version, deadline)]

    def tell(self, version: int, failed: Iterable[int]) -> None:
        """The ranks that could not."""
        self._send([_VERDICT, version, *failed], [])

    def close(self) -> None:
        for opened in (*self._sockets.values(), self._listener):
            opened.close()
        self._path.unlink(missing_ok=True)

    def _meet(self) -> None:
        while len(self._sockets) < len(self._peers):
            try:
                peer, _ = self._listener.accept()
            except TimeoutError as error:
                missing = sorted(set(self._peers) - self._sockets.keys())
                raise TimeoutError(f"weights: ranks {missing} did not come to write in {_TIMEOUT_S:.0f} s") from error
            peer.settimeout(_TIMEOUT_S)
            (rank,) = _receive(peer)
            self._sockets[rank] = peer

    def _send(self, numbers: Sequence[int], fds: list[int]) -> None:
        """To those that have come."""
        for peer in self._sockets.values():
            with suppress(ConnectionError):
                socket.send_fds(peer, [array("q", numbers).tobytes()], fds)

    def _has_written(self, rank: int, version: int, deadline: float) -> bool:
        if rank not in self._sockets:
            return False  # it has never come
        peer = self._sockets[rank]
        try:
            about = is_written = -1
            while about < version:  # skips what came after its time was up
                peer.settimeout(max(0.001, deadline - time.monotonic()))
                about, is_written = _receive(peer)
            peer.settimeout(_TIMEOUT_S)
        except OSError as error:
            logger.warning("weights: rank %d does not say whether it has written version %d: %s", rank, version, error)
            return False
        return bool(is_written)


class Borrower:
    """The other end, on `rank`. Raises OSError, in every call, if the lender has gone or is silent."""

    def __init__(self, root: Path, rank: int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(_BORROWER_TIMEOUT_S)
        with short_path(root, _NAME) as address:
            self._socket.connect(address)
        _send(self._socket, [rank])

    def receive(self, touched: Sequence[tuple[int, int]]) -> Lent | None:
        """The file is mapped, and what will be `touched` faulted in. None if there is no buffer for this version."""
        message, fds, _, _ = socket.recv_fds(self._socket, _MESSAGE_BYTES, 1)
        try:
            kind, *numbers = _numbers(message)
            if kind == _REFUSED:
                return None
            _expect(kind == _LENT)
            return Lent(numbers[0], numbers[1:], map_bytes(fds[0], touched) if fds else None)
        finally:
            for fd in fds:
                os.close(fd)

    def report(self, version: int, is_written: bool) -> None:
        _send(self._socket, [version, is_written])

    def failed(self, version: int) -> list[int]:
        """The ranks that have not written the version, once that is known."""
        kind, *numbers = _receive(self._socket)
        _expect(kind == _VERDICT and numbers[0] == version)
        return numbers[1:]

    def close(self) -> None:
        self._socket.close()


def _expect(is_in_turn: bool) -> None:
    if not is_in_turn:
        raise ConnectionError("the other end is at another version")


def _send(to: socket.socket, numbers: Sequence[int]) -> None:
    to.send(array("q", numbers).tobytes())


def _receive(of: socket.socket) -> list[int]:
    return _numbers(of.recv(_MESSAGE_BYTES))


def _numbers(message: bytes) -> list[int]:
    if not message:
        raise ConnectionError("the other end has gone")
    return array("q", message).tolist()
