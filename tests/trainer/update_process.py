"""One rank of a world: trains every configuration of `whole_batches` and leaves what came out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.trainer.ranks import joined
from tests.trainer.whole_batches import CONFIGURATIONS, dealt, make, make_batch, updates


def train_all(rank: int, world_size: int, out: Path, model_dir: Path) -> None:
    with joined(rank, world_size, out) as world:
        mine = dealt(make_batch(), rank) if world_size > 1 else make_batch()
        for name in CONFIGURATIONS:
            trainer = make(name, model_dir, world)
            shares = [mine[:4], mine[4:]] if rank else [mine]
            metrics, parameters = updates(trainer, *shares)
            (out / f"{name}-{rank}.json").write_text(json.dumps(metrics))
            np.savez(out / f"{name}-{rank}.npz", **parameters)
