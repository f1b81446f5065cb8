"""Ranks that meet, and what becomes of those whose neighbour dies."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flowrl.trainer.totals import Totals
from flowrl.trainer.world import World, join
from tests.trainer.conftest import free_port

ROOT = Path(__file__).parents[2]

# Rank 0 sums with rank 1 once; then rank 1 dies without a word, and rank 0 says how its next sum ended.
PROGRAM = """
import os, sys
from flowrl.trainer.totals import Totals
from flowrl.trainer.world import join

rank, port = int(sys.argv[1]), int(sys.argv[2])
totals = Totals()
totals.add("ranks", 1.0)
with join(host="127.0.0.1", port=port, rank=rank, world_size=2, interface="lo", timeout_s=20) as world:
    assert totals.reduce(world) == {"ranks": 2.0}
    if rank == 1:
        os._exit(9)
    try:
        totals.reduce(world)
    except RuntimeError as error:
        print("refused", flush=True)
        os._exit(0)
"""


def test_rank_whose_neighbour_died_fails_and_does_not_hang() -> None:
    port = str(free_port())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(rank), port], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        output, _ = ranks[0].communicate(timeout=60)
        assert ranks[1].wait(timeout=10) == 9
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    assert output == "refused\n"
    assert time.monotonic() - started < 45


def test_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank: 2; must be from 0 to 1"), join(host="", port=0, rank=2, world_size=2):
        pass


def test_totals_add_up_without_losing_small_counts(world: World) -> None:
    totals = Totals()
    for _ in range(3):
        totals.add("tokens", float(2**24))
        totals.add("tokens", 1.0)
        totals.add("loss", torch.tensor(0.5, requires_grad=True))
    totals.maximum("largest", torch.tensor(2.0))
    totals.maximum("largest", torch.tensor(1.0))
    assert totals.reduce(world) == {"tokens": 3 * 2**24 + 3, "loss": 1.5, "largest": 2.0}
