"""Checkpoints of a trainer: model, optimizer, step, and what the caller adds. One directory a step, whole or not there.

    directory/step_40/        shards and metadata of torch.distributed.checkpoint, and state.json
    directory/.new-step_40/   being written

It may be loaded at another world size: parameters and moments are saved as they are sharded, resharded on the way in.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World

STATE_FILE = "state.json"
STEP_NAME = re.compile(r"step_(\d+)")


def save(directory: Path, trainer: PolicyTrainer, world: World, *, extra: Mapping[str, Any], keep: int) -> Path:
    """On every rank, between updates. Keeps the newest `keep` checkpoints.

    extra: whatever else must continue from here, as JSON; that of rank 0 is saved. A step saved twice is replaced.
    """
    if keep < 1:
        raise ValueError(f"keep: {keep}; must be at least 1")
    path = directory / f"step_{trainer.step}"
    staging = directory / f".new-{path.name}"
    if world.rank == 0:
        _clear(staging)
        staging.mkdir(parents=True)
        (staging / STATE_FILE).write_text(json.dumps({"step": trainer.step, "extra": dict(extra)}))
    dist.barrier()
    dcp.save(_tensors(trainer), checkpoint_id=staging)
    if world.rank == 0:
        _clear(path)
        staging.rename(path)
        for step in saved_steps(directory)[:-keep]:
            shutil.rmtree(directory / f"step_{step}")
    dist.barrier()
    return path


def load(path: Path, trainer: PolicyTrainer) -> dict[str, Any]:
    """On every rank: restores the trainer in place, and returns what was saved as `extra`.

    Raises FileNotFoundError if there is no checkpoint at `path`.
    """
    state = json.loads((path / STATE_FILE).read_text())
    dcp.load(_tensors(trainer), checkpoint_id=path)
    trainer.step = state["step"]
    extra: dict[str, Any] = state["extra"]
    return extra


def latest(directory: Path) -> Path | None:
    steps = saved_steps(directory)
    return directory / f"step_{steps[-1]}" if steps else None


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that are whole, oldest first."""
    if not directory.exists():
        return []
    matches = (STEP_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _tensors(trainer: PolicyTrainer) -> dict[str, dict[str, torch.Tensor]]:
    """Live tensors: saving reads them, loading writes into them."""
    parameters = {name: tensor.detach() for name, tensor in trainer.policy.lm.named_parameters()}
    return {"model": parameters, "optimizer": trainer.optimizer.state_dict()}


def _clear(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
