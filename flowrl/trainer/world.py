"""The trainer ranks' torch.distributed world: joining it, its mesh, leaving it. It knows no model.

One dead rank ends the world: the others' collectives fail within `timeout_s`, and all start again from a checkpoint.
The store that ranks meet at has no secret and listens on every interface: it belongs on a closed network.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True, kw_only=True)
class World:
    """A joined world. `mesh` is one-dimensional: parameters are sharded over all ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh


@contextmanager
def join(
    *,
    rank: int,
    world_size: int,
    file: Path | None = None,
    host: str = "",
    port: int = 0,
    device: str = "cpu",
    interface: str | None = None,
    timeout_s: float = 300.0,
) -> Iterator[World]:
    """Waits until all ranks have met, at most `timeout_s`; leaves the world at the end.

    file: where ranks of one machine meet; it must not exist before. host, port: where those of several do; torch's
    store listens there on all interfaces and has no secret, so that network must be a closed one.
    interface: the network interface that collectives use; None leaves the choice to the backend.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank}; must be from 0 to {world_size - 1}")
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    torch_device = torch.device(device)
    is_gpu = torch_device.type == "cuda"
    if is_gpu:
        torch.cuda.set_device(torch_device)
    timeout = timedelta(seconds=timeout_s)
    # Checkpoints and scalars on the host go over gloo also where gradients go over NCCL.
    backend = "cpu:gloo,cuda:nccl" if is_gpu else "gloo"
    if file is not None:
        store: dist.Store = dist.FileStore(str(file), world_size)
    else:
        store = dist.TCPStore(host, port, world_size, is_master=rank == 0, timeout=timeout)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=torch_device if is_gpu else None,
    )
    try:
        mesh = init_device_mesh(torch_device.type, (world_size,), mesh_dim_names=("ranks",))
        yield World(rank=rank, size=world_size, device=torch_device, mesh=mesh)
    finally:
        dist.destroy_process_group()


def any_rank(flag: bool, world: World) -> bool:
    """On every rank: whether it holds on any. Asked on the host, beside what a GPU does."""
    if world.size == 1:
        return flag
    total = torch.tensor([int(flag)])
    dist.all_reduce(total)
    return bool(total.item())
