"""Who the nodes are, and whether they run the same thing: exchanged once, before anything starts."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import threading

import msgspec

from controllers.peers import Peers

_HANDLER = "roster/card"
_PACKAGES = ("flowrl", "torch", "pyzmq", "msgspec", "numpy", "transformers", "safetensors")


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """What a node says of itself. plan: hash of recipe and placement. address: where its workers can be reached.
    secret: of the queue's sockets; life, restore_from: as in ControllerSettings. Of these three node 0's are
    everybody's."""

    node: int
    host: str
    address: str
    plan: str
    versions: dict[str, str]
    secret: str = ""
    life: int = 0
    restore_from: str = ""


class Roster:
    """Make it before `peers.start()`; `gather` returns all cards, by node."""

    def __init__(self, peers: Peers, card: Card) -> None:
        self._peers = peers
        self._card = card
        self._cards = {card.node: card}
        self._changed = threading.Condition()
        peers.register(_HANDLER, self._take)

    def gather(self, timeout_s: float) -> dict[int, Card]:
        """Raises TimeoutError naming the nodes that are missing, ValueError naming the one that differs."""
        self._peers.broadcast(_HANDLER, msgspec.msgpack.encode(self._card))
        with self._changed:
            if not self._changed.wait_for(lambda: len(self._cards) == self._peers.num_nodes, timeout_s):
                missing = sorted(set(range(self._peers.num_nodes)) - set(self._cards))
                raise TimeoutError(f"nodes {missing} did not say who they are within {timeout_s:.0f} s")
        for node in sorted(self._cards):
            refuse_difference(self._card, self._cards[node])
        return self._cards

    def _take(self, _node: int, payload: bytes) -> bytes:
        card = msgspec.msgpack.decode(payload, type=Card)
        with self._changed:
            self._cards[card.node] = card
            self._changed.notify_all()
        return b""


def refuse_difference(mine: Card, other: Card) -> None:
    """Raises ValueError if the two nodes do not run the same plan with the same packages."""
    if mine.plan != other.plan:
        raise ValueError(
            f"node {other.node} ({other.host}) has another recipe or placement than node {mine.node} ({mine.host}): "
            f"plan {other.plan}, not {mine.plan}"
        )
    for package, version in mine.versions.items():
        theirs = other.versions.get(package, "none")
        if theirs != version:
            raise ValueError(
                f"node {other.node} ({other.host}) has {package} {theirs}; node {mine.node} ({mine.host}) has {version}"
            )


def installed_versions() -> dict[str, str]:
    """Of what must agree among nodes; the interpreter counts to the minor version."""
    versions = {"python": ".".join(platform.python_version_tuple()[:2]), "platform": platform.machine()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "none"
    return versions


def host_name() -> str:
    return socket.gethostname()
