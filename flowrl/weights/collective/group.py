"""One engine and all trainer ranks as a process group of their own, beside whatever group their processes have.

The engine is rank 0, trainer rank r is rank r + 1. Every wait has a limit and names the peer that it was for. On GPUs
the backend is NCCL, else gloo.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

_POLL_S = 0.0005


class PeerLost(ConnectionError):
    """The other end of a transfer has gone, or is silent; the message names it."""


class Group:
    """Who opens it closes it. name: no other group ever has it. Raises PeerLost if not all have come in time."""

    def __init__(
        self, name: str, store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        self._device = device
        self._timeout_s = timeout_s
        limit = timedelta(seconds=timeout_s)
        try:
            # What torch offers in public makes groups within one world; both ends here have worlds of their own.
            self._group, _ = distributed_c10d._new_process_group_helper(
                size,
                rank,
                [],
                dist.Backend("nccl" if device.type == "cuda" else "gloo"),
                dist.PrefixStore(name, store),
                group_name=distributed_c10d.GroupName(name),
                timeout=limit,
            )
            distributed_c10d._world.pg_group_ranks[self._group] = {other: other for other in range(size)}
            # The first call makes the connections, all of them at once: not when the first version waits for it.
            dist.all_reduce(torch.zeros(1, device=device), group=self._group)
        except RuntimeError as error:
            raise PeerLost(
                f"the group {name} of an engine and {size - 1} trainer ranks did not form: {error}"
            ) from error

    def send(self, tensor: torch.Tensor, to: int, who: str) -> None:
        """Returns when it has been sent. Raises PeerLost naming `who`."""
        self.wait(self._start(dist.isend, {to: tensor}), {to: who})

    def receive(self, tensors: Mapping[int, torch.Tensor]) -> dict[int, dist.Work]:
        """Begins to receive, from each of these ranks of the group."""
        return self._start(dist.irecv, tensors)

    def wait(self, works: Mapping[int, dist.Work], names: Mapping[int, str]) -> None:
        deadline = time.monotonic() + self._timeout_s
        for peer, work in works.items():
            left = max(0.001, deadline - time.monotonic())
            try:
                work.wait(timedelta(seconds=left))
                if self._device.type == "cuda":
                    self._wait_for_device(deadline)
            except RuntimeError as error:
                said = str(error).partition("\n")[0]
                raise PeerLost(f"{names[peer]} has gone, or was silent for {self._timeout_s:.0f} s: {said}") from error

    def close(self) -> None:
        with suppress(RuntimeError, ValueError):  # of a group that a peer's death has broken, or whose world has gone
            dist.destroy_process_group(self._group)

    def _start(self, operation: object, tensors: Mapping[int, torch.Tensor]) -> dict[int, dist.Work]:
        """On NCCL all operations of a batch are one work."""
        operations = [
            dist.P2POp(operation, tensor, group=self._group, group_peer=peer)  # type: ignore[arg-type]
            for peer, tensor in tensors.items()
        ]
        works = dist.batch_isend_irecv(operations)
        return dict(zip(tensors, works, strict=False))

    def _wait_for_device(self, deadline: float) -> None:
        """NCCL's `wait` makes the stream wait, and nobody would notice that a peer is dead."""
        event = torch.cuda.Event()
        event.record()
        while not event.query():
            if time.monotonic() > deadline:
                distributed_c10d._abort_process_group(self._group)
                raise RuntimeError("the transfer did not end in time")
            time.sleep(_POLL_S)


def host_store(directory: Path | None, name: str, address: str, size: int, timeout_s: float) -> tuple[dist.Store, str]:
    """For the engine: the store that its group meets at, and how the others find it. directory: on one host, a file in
    it; None: a port of `address`, without a secret, so on a closed network."""
    if directory is not None:
        path = directory / f"weights-{name}"
        return dist.FileStore(str(path), size), str(path)
    store = dist.TCPStore(address, 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout_s))
    return store, f"{address}:{store.port}"


def join_store(where: str, size: int, timeout_s: float) -> dist.Store:
    """Raises PeerLost if the engine's port does not answer."""
    if where.startswith("/"):
        return dist.FileStore(where, size)
    host, _, port = where.rpartition(":")
    try:
        return dist.TCPStore(host, int(port), is_master=False, timeout=timedelta(seconds=timeout_s))
    except RuntimeError as error:
        raise PeerLost(f"the engine's store at {where} does not answer: {error}") from error


def use_interface(interface: str | None) -> None:
    """Where collectives go, as `trainer.world.join` sets it for the trainer."""
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
