"""Ranks that meet, and what becomes of those whose neighbour dies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl.trainer.totals import Totals, spreads
from flowrl.trainer.world import World, join
from tests.trainer.conftest import free_port
from tests.trainer.ranks import process, sum_until_one_dies


def test_rank_whose_neighbour_died_fails_and_does_not_hang(tmp_path: Path) -> None:
    """Rank 0 sums with rank 1 once; then rank 1 dies without a word, and rank 0 says how soon its next sum ended."""
    port = free_port()
    ranks = [process(sum_until_one_dies, rank, port, tmp_path) for rank in range(2)]
    try:
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(60)
        assert [rank.exitcode for rank in ranks] == [0, 9]
    finally:
        for rank in ranks:
            rank.kill()
            rank.join()
    assert float((tmp_path / "refused_s").read_text()) < 30


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


def test_spreads_are_of_all_values_and_zero_of_none(world: World) -> None:
    totals = Totals()
    totals.add("rows", 1.0)
    for values in ([-1.0, 4.0], [], [3.0]):
        totals.measure("score", np.array(values, np.float32))
    totals.measure("none", np.empty(0))
    reduced = totals.reduce(world)
    assert spreads(reduced) == {
        "score/mean": 2.0, "score/max": 4.0, "score/min": -1.0, "none/mean": 0.0, "none/max": 0.0, "none/min": 0.0,
    }  # fmt: skip
    assert reduced == {"rows": 1.0}
