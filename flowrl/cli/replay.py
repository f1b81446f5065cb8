"""`flowrl replay RUN`: retrains a recorded run from what it consumed and compares the weights after every update."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="directory of a run")
    parser.add_argument("--out", type=Path, default=None, help="where to leave the model (default: RUN/replay)")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 if every update gave the same bits, 1 if one did not."""
    from flowrl.replay.ranks import replay

    replayed = replay(arguments.run.resolve(), (arguments.out or arguments.run / "replay").resolve())
    ranks = f"{replayed.world_size} rank" + ("s" if replayed.world_size > 1 else "")
    if replayed.divergence:
        print(f"the replay differs from the run {replayed.divergence}")
        return 1
    print(f"{replayed.steps} updates replayed on {ranks}: every parameter has the same bits after each")
    print(f"model: {replayed.out / 'model'}")
    return 0
