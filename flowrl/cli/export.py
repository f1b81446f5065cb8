"""`flowrl export RUN|CHECKPOINT OUT`: a checkpoint as a Hugging Face directory."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="a run's directory (its newest checkpoint) or runs/NAME/checkpoints/step_N")
    parser.add_argument("out", help="the directory to write; it must not exist")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: the recipe's model.dtype")


def run(arguments: argparse.Namespace) -> int:
    from flowrl.trainer.export import export, find

    source = find(Path(arguments.source))
    export(source, Path(arguments.out), arguments.dtype)
    print(f"exported {source.checkpoint} to {arguments.out}")
    return 0
