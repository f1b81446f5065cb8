"""Real ranks for the trainer's tests: processes over gloo that meet at a file.

They are forked from a server that has imported everything once, instead of each importing torch.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from flowrl.trainer.totals import Totals
from flowrl.trainer.world import World, join

ROOT = Path(__file__).parents[2]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.trainer.ladder_process"])


def process(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Not started yet."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return CONTEXT.Process(target=target, args=arguments, daemon=True)


def run_ranks(case: Callable[..., None], world_size: int, out: Path, *arguments: Any, timeout_s: float = 200) -> None:
    """Calls `case(rank, world_size, out, *arguments)` in so many processes; all must succeed."""
    ranks = [process(_run, case, rank, world_size, out, *arguments) for rank in range(world_size)]
    deadline = time.monotonic() + timeout_s
    try:
        for started in ranks:
            started.start()
        for rank, started in enumerate(ranks):
            started.join(max(0.0, deadline - time.monotonic()))
            assert started.exitcode == 0, f"rank {rank}: {started.exitcode}\n{_log(out, rank)}"
    finally:
        for started in ranks:
            started.kill()
            started.join()


def _run(case: Callable[..., None], rank: int, world_size: int, out: Path, *arguments: Any) -> None:
    warnings.simplefilter("error")
    try:
        case(rank, world_size, out, *arguments)
    except BaseException:
        (out / f"rank-{rank}.log").write_text(traceback.format_exc())
        raise


def _log(out: Path, rank: int) -> str:
    path = out / f"rank-{rank}.log"
    return path.read_text() if path.exists() else "it left no word"


@contextmanager
def joined(rank: int, world_size: int, out: Path) -> Iterator[World]:
    torch.set_num_threads(1)
    with join(rank=rank, world_size=world_size, file=out / "world", interface="lo", timeout_s=60) as world:
        yield world


def sum_until_one_dies(rank: int, port: int, out: Path) -> None:
    totals = Totals()
    totals.add("ranks", 1.0)
    with join(host="127.0.0.1", port=port, rank=rank, world_size=2, interface="lo", timeout_s=20) as world:
        assert totals.reduce(world) == {"ranks": 2.0}
        if rank == 1:
            os._exit(9)
        started = time.monotonic()
        try:
            totals.reduce(world)
        except RuntimeError:
            (out / "refused_s").write_text(str(time.monotonic() - started))
            os._exit(0)
