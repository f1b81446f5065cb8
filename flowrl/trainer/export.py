"""From a run's checkpoint to a Hugging Face directory that depends on nothing else. In one process."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from flowrl.config import Recipe, load
from flowrl.trainer.checkpoint import STATE_FILE, latest, load_model
from flowrl.trainer.model import load_policy
from flowrl.trainer.world import join
from flowrl.weights.publish import Publisher

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True)
class Source:
    """A checkpoint and the recipe of its run."""

    checkpoint: Path
    recipe: Recipe


def find(path: Path) -> Source:
    """path: a run's directory, for its newest checkpoint, or one of its checkpoints.

    Raises ValueError for anything else, and for a run without a checkpoint.
    """
    if (path / STATE_FILE).is_file():
        checkpoint, run = path, path.parent.parent
        if not (run / RECIPE_FILE).is_file():
            raise ValueError(f"export: {str(path)!r} is a checkpoint outside a run; {run / RECIPE_FILE} is missing")
    elif (path / RECIPE_FILE).is_file():
        run, newest = path, latest(path / "checkpoints")
        if newest is None:
            raise ValueError(f"export: {str(path)!r} has no checkpoint; run.checkpoint_every makes them")
        checkpoint = newest
    else:
        raise ValueError(f"export: {str(path)!r} is neither a run nor a checkpoint of one")
    return Source(checkpoint, load(run / RECIPE_FILE))


def export(source: Source, out: Path, dtype: str | None = None) -> None:
    """Writes the directory `out`, which must not exist. dtype: null for `model.dtype` of the recipe."""
    if out.exists():
        raise ValueError(f"export: {str(out)!r} exists already")
    model = source.recipe.model
    with (
        tempfile.TemporaryDirectory(prefix="flowrl-export-") as meeting,
        join(rank=0, world_size=1, file=Path(meeting) / "world") as world,
    ):
        policy = load_policy(model.path, world, lora=model.lora)
        load_model(source.checkpoint, policy)
        out.parent.mkdir(parents=True, exist_ok=True)
        Publisher(policy.published, Path(model.path), None, dtype or model.dtype).export(out)
