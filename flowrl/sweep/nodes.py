"""A sweep over several nodes: node 0 works the points off, the others start their part of each when told.

The sweep's own processes speak by `controllers/peers.py`; each point's controllers meet at a store of their own, on a
free port of node 0, so that nothing of one point is left for the next.
"""

from __future__ import annotations

import socket
import time
from queue import SimpleQueue
from typing import Protocol

import msgspec

from controllers.peers import TorchPeers
from controllers.reaper import Reaper
from controllers.topology import Topology
from flowrl.sweep.directory import SweepDirectory
from flowrl.sweep.process import PointProcess

START_S = 120.0
PEER_S = 20.0
POLL_S = 0.3


class Start(msgspec.Struct, frozen=True, tag=True):
    """name: of the point. arguments: of `flowrl run`. port: where this point's controllers meet."""

    number: int
    name: str
    arguments: list[str]
    port: int


class End(msgspec.Struct, frozen=True, tag=True):
    """The point is to end now."""


class Over(msgspec.Struct, frozen=True, tag=True):
    """The sweep is done; also what a node tells itself when node 0 is lost."""

    reason: str = ""


_decode = msgspec.msgpack.Decoder(Start | End | Over).decode
_encode = msgspec.msgpack.encode


class Nodes(Protocol):
    """What the sweep tells the nodes besides this one."""

    def start(self, number: int, name: str, arguments: list[str]) -> dict[str, str]:
        """The environment for this node's own part of the point."""
        ...

    def end(self) -> None: ...

    def has_ended(self, number: int) -> bool: ...

    def lost(self) -> str:
        """Which node was lost and why, empty for none."""
        ...

    def close(self) -> None: ...


class OneNode:
    def start(self, number: int, name: str, arguments: list[str]) -> dict[str, str]:
        return {}

    def end(self) -> None:
        """There are no others."""

    def has_ended(self, number: int) -> bool:
        return True

    def lost(self) -> str:
        return ""

    def close(self) -> None:
        """Nothing is open."""


class Leader:
    """Node 0's end."""

    def __init__(self, topology: Topology, interface: str) -> None:
        self._topology = topology
        self._ended: dict[int, set[int]] = {}
        self._lost: list[str] = []
        self._peers = TorchPeers(topology, interface, START_S, PEER_S, self._lose)
        self._peers.register("sweep/ended", self._hear_end)
        self._peers.start()

    def start(self, number: int, name: str, arguments: list[str]) -> dict[str, str]:
        port = free_port()
        self._peers.broadcast("sweep/word", _encode(Start(number, name, arguments, port)))
        return point_environment(self._topology, number, port)

    def end(self) -> None:
        self._peers.broadcast("sweep/word", _encode(End()))

    def has_ended(self, number: int) -> bool:
        return len(self._ended.get(number, ())) == self._topology.num_nodes - 1

    def lost(self) -> str:
        return self._lost[0] if self._lost else ""

    def close(self) -> None:
        self._peers.broadcast("sweep/word", _encode(Over()))
        self._peers.close(is_orderly=not self._lost)

    def _hear_end(self, node: int, payload: bytes) -> bytes:
        self._ended.setdefault(int(payload), set()).add(node)
        return b""

    def _lose(self, node: int, reason: str) -> None:
        self._lost.append(f"node {node} is lost: {reason}")


def follow(topology: Topology, interface: str, directory: SweepDirectory, reaper: Reaper) -> int:
    """Every other node's end: until node 0 says that the sweep is over, or is lost (exit code 1)."""
    words: SimpleQueue[Start | End | Over] = SimpleQueue()

    def hear(_node: int, payload: bytes) -> bytes:
        words.put(_decode(payload))
        return b""

    def lose(node: int, reason: str) -> None:
        if node == 0:
            words.put(Over(f"node 0 is lost: {reason}"))

    peers = TorchPeers(topology, interface, START_S, PEER_S, lose)
    peers.register("sweep/word", hear)
    peers.start()
    while not isinstance(word := words.get(), Over):
        if isinstance(word, Start):
            directory.set_part_aside(word.name, topology.node)
            environment = point_environment(topology, word.number, word.port)
            log = directory.path / "logs" / f"{word.name}.node{topology.node}.log"
            process = PointProcess(word.arguments, log, reaper, environment)
            over = _wait(process, words)
            peers.post(0, "sweep/ended", str(word.number).encode())
            if over is not None:
                word = over
                break
    peers.close(is_orderly=not word.reason)
    if word.reason:
        print(f"flowrl: the sweep ended on node {topology.node}: {word.reason}", flush=True)
    return 1 if word.reason else 0


def _wait(process: PointProcess, words: SimpleQueue[Start | End | Over]) -> Over | None:
    """Until the process has ended; hands back the word that the sweep is over, should it come meanwhile."""
    over: Over | None = None
    while process.poll() is None:
        time.sleep(POLL_S)
        while not words.empty():
            word = words.get()
            process.end()
            over = word if isinstance(word, Over) else over
    return over


def point_environment(topology: Topology, number: int, port: int) -> dict[str, str]:
    """torchrun's variables for one point: another name and another store than the sweep's own."""
    return {
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"{topology.run_id}-{number}",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
