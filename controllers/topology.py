"""Which node this controller is, of how many. The only reader of torchrun's environment.

Without torchrun a process is node 0 of 1. Workers get none of these variables: they build worlds of their own, and a
library that found torchrun's `RANK` in a worker would join the wrong one.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "GROUP_WORLD_SIZE",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "ROLE_NAME",
    "MASTER_ADDR",
    "MASTER_PORT",
)
_ELASTIC_PREFIX = "TORCHELASTIC_"


@dataclass(frozen=True, kw_only=True)
class Topology:
    """node: this controller's number among `num_nodes`. local_node: its number among the `nodes_on_host` controllers of
    this machine (virtual nodes). run_id: fit for a file name. restart: how often this node's controller failed and
    torchrun began anew. launcher: the torchrun process and which of its controllers this is, by a name that no other
    has; empty without one."""

    node: int = 0
    num_nodes: int = 1
    local_node: int = 0
    nodes_on_host: int = 1
    master_addr: str = "127.0.0.1"
    master_port: int = 0
    run_id: str = "alone"
    restart: int = 0
    launcher: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.node < self.num_nodes:
            raise ValueError(f"RANK: {self.node}; must be at least 0 and below WORLD_SIZE = {self.num_nodes}")
        if not 0 <= self.local_node < self.nodes_on_host:
            raise ValueError(f"LOCAL_RANK: {self.local_node}; must be below LOCAL_WORLD_SIZE = {self.nodes_on_host}")

    @property
    def is_on_one_host(self) -> bool:
        return self.nodes_on_host == self.num_nodes

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Topology:
        """Raises ValueError if torchrun's variables are there in part or are no numbers."""
        if "RANK" not in environ and "WORLD_SIZE" not in environ:
            return cls(run_id=f"pid{os.getpid()}")
        port = _number(environ, "MASTER_PORT")
        if port == 0:
            raise ValueError("MASTER_PORT: 0; nodes need a port to meet at (torchrun --standalone finds a free one)")
        run_id = re.sub(r"[^\w-]", "-", environ.get("TORCHELASTIC_RUN_ID", "none"))
        return cls(
            node=_number(environ, "RANK"),
            num_nodes=_number(environ, "WORLD_SIZE"),
            local_node=_number(environ, "LOCAL_RANK"),
            nodes_on_host=_number(environ, "LOCAL_WORLD_SIZE"),
            master_addr=environ["MASTER_ADDR"],
            master_port=port,
            # torchrun says "none" unless told a name; two such runs on one machine differ by their port.
            run_id=run_id if run_id != "none" else f"port{port}",
            restart=int(environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
            launcher=f"{_launcher()} {_number(environ, 'LOCAL_RANK')}",
        )


def without_torchrun(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment that workers get."""
    return {
        name: value
        for name, value in environ.items()
        if name not in _VARIABLES and not name.startswith(_ELASTIC_PREFIX)
    }


def _launcher() -> str:
    """The torchrun above this process, or the process right above: where it runs, its id, and when it began, in ticks
    since the machine did."""
    ancestor = nearest = os.getppid()
    with suppress(OSError):  # others' processes may be hidden
        while ancestor > 1:
            line = Path(f"/proc/{ancestor}/cmdline").read_bytes()
            if b"torchrun" in line or b"torch.distributed.run" in line:
                nearest = ancestor
                break
            ancestor = int(_stat(ancestor)[1])
    return f"{socket.gethostname()} {nearest} {_stat(nearest)[19]}"


def _stat(pid: int) -> list[str]:
    """The kernel's fields of a process after its name: state, parent, … (proc(5))."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()


def _number(environ: Mapping[str, str], name: str) -> int:
    text = environ.get(name, "")
    if not text.isdigit():
        raise ValueError(f"{name}: {text!r}; torchrun sets it to a number, and the others beside it")
    return int(text)
