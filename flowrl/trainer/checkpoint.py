"""Checkpoints of a trainer: model, optimizer, step, its critic's too, and what the caller adds. Whole or not there.

    directory/step_40/        shards and metadata of torch.distributed.checkpoint, and state.json
    directory/.new-step_40/   being written

It may be loaded at another world size: parameters and moments are saved as they are sharded, resharded on the way in.
Parameters that are not trained (under LoRA all but the adapters) are not in it; they are those of `model.path`.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from flowrl.trainer.model import Policy
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World

STATE_FILE = "state.json"
GRACE_S = 30.0
STEP_NAME = re.compile(r"step_(\d+)")


def save(
    directory: Path,
    trainer: PolicyTrainer,
    world: World,
    *,
    extra: Mapping[str, Any],
    keep: int,
    beside: Callable[[Path], object] = lambda staging: None,
) -> Path:
    """On every rank, between updates: returns when it is there. Keeps the newest `keep` checkpoints.

    extra: whatever else must continue from here, as JSON; that of rank 0 is saved. A step saved twice is replaced.
    beside: called on rank 0 with the directory being written, while all ranks stand still, for what belongs to the same
    moment.
    """
    path = directory / f"step_{trainer.step}"
    staging = _begin(path, trainer, world, extra, keep, beside)
    dcp.save(_tensors(trainer), checkpoint_id=staging)
    if world.rank == 0:
        _commit(staging, path, keep)
    dist.barrier()
    if world.rank > 0:
        _keep_part(staging, path, world.rank)
    return path


class CheckpointWriter:
    """Saves while training goes on: `save` returns once everything is copied on the host, a thread writes it.

    Every rank makes one, and leaves it as a context: with an error, it gives what is being written `GRACE_S` seconds.
    The thread's collectives have a group of their own, so that they never meet those of training.
    """

    def __init__(self, directory: Path, world: World, *, keep: int) -> None:
        self._directory = directory
        self._world = world
        self._keep = keep
        self._group = dist.new_group(backend="gloo")
        self._writing: tuple[Path, Future[Path]] | None = None

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.wait()
            return
        # What went wrong is more to the point than what becomes of this.
        with suppress(Exception):
            self.wait(GRACE_S)

    def save(
        self,
        trainer: PolicyTrainer,
        *,
        extra: Mapping[str, Any],
        beside: Callable[[Path], object] = lambda staging: None,
    ) -> None:
        """On every rank, between updates; as `save` of this module. Waits for the one before it."""
        self.wait()
        path = self._directory / f"step_{trainer.step}"
        staging = _begin(path, trainer, self._world, extra, self._keep, beside)
        written = dcp.async_save(_tensors(trainer), checkpoint_id=staging, process_group=self._group)
        assert isinstance(written, Future)
        whole: Future[Path] = Future()
        written.add_done_callback(lambda done: self._finish(done, staging, path, whole))
        self._writing = path, whole

    def finished(self) -> Path | None:
        """The checkpoint that became whole since this was last asked; on ranks above 0, of which this rank's part did.
        Raises what kept it from being written."""
        if self._writing is None or not self._writing[1].done():
            return None
        return self.wait()

    def wait(self, timeout_s: float = 600.0) -> Path | None:
        """As `finished`, once it is. Raises TimeoutError naming the checkpoint."""
        if self._writing is None:
            return None
        path, whole = self._writing
        try:
            whole.result(timeout_s)
        except TimeoutError as error:
            raise TimeoutError(f"checkpoint {path} is not written after {timeout_s:g} s") from error
        self._writing = None
        return path

    def _finish(self, written: Future[Any], staging: Path, path: Path, whole: Future[Path]) -> None:
        """In the writing thread. On rank 0 the parts of all ranks are there by now: it has written the metadata."""
        try:
            written.result()
            if self._world.rank == 0:
                _commit(staging, path, self._keep)
            whole.set_result(path)
        except BaseException as error:
            whole.set_exception(error)


def load(path: Path, trainer: PolicyTrainer) -> dict[str, Any]:
    """On every rank: restores the trainer in place, and returns what was saved as `extra`.

    Raises FileNotFoundError if there is no checkpoint at `path`.
    """
    state = json.loads((path / STATE_FILE).read_text())
    dcp.load(_tensors(trainer), checkpoint_id=path)
    trainer.step = state["step"]
    trainer.spikes.restore(state["spikes"])
    if trainer.critic is not None:
        trainer.critic.step = state["critic_step"]
    extra: dict[str, Any] = state["extra"]
    return extra


def load_model(path: Path, policy: Policy) -> None:
    """The policy alone, as of the checkpoint at `path`."""
    dcp.load({"model": _trained(policy.lm)}, checkpoint_id=path)


def latest(directory: Path) -> Path | None:
    steps = saved_steps(directory)
    return directory / f"step_{steps[-1]}" if steps else None


def saved_steps(directory: Path) -> list[int]:
    """Steps of the checkpoints that are whole, oldest first."""
    if not directory.exists():
        return []
    matches = (STEP_NAME.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)


def _begin(
    path: Path,
    trainer: PolicyTrainer,
    world: World,
    extra: Mapping[str, Any],
    keep: int,
    beside: Callable[[Path], object],
) -> Path:
    """Makes the directory to write into."""
    if keep < 1:
        raise ValueError(f"keep: {keep}; must be at least 1")
    staging = path.with_name(f".new-{path.name}")
    if world.rank == 0:
        _clear(staging)
        staging.mkdir(parents=True)
        critic_step = trainer.critic.step if trainer.critic is not None else 0
        state = {
            "step": trainer.step,
            "critic_step": critic_step,
            "spikes": trainer.spikes.state(),
            "extra": dict(extra),
        }
        (staging / STATE_FILE).write_text(json.dumps(state))
        beside(staging)
    dist.barrier()
    # On a disk that rank 0 does not see nobody renames them.
    for left in path.parent.glob(".new-*"):
        if left != staging:
            shutil.rmtree(left, ignore_errors=True)
    return staging


def _commit(staging: Path, path: Path, keep: int) -> None:
    _clear(path)
    staging.rename(path)
    for step in saved_steps(path.parent)[:-keep]:
        shutil.rmtree(path.with_name(f"step_{step}"))


def _keep_part(staging: Path, path: Path, rank: int) -> None:
    """After rank 0's commit. A directory that it has not renamed is on another disk, and holds the parts of ranks here
    alone: put together with those of the other disks they are the checkpoint."""
    if not staging.exists():
        return
    path.mkdir(exist_ok=True)
    for part in staging.glob(f"__{rank}_*"):
        part.replace(path / part.name)
    with suppress(OSError):  # until the last rank of this disk has been here
        staging.rmdir()


def _tensors(trainer: PolicyTrainer) -> dict[str, dict[str, torch.Tensor]]:
    """Live tensors: saving reads them, loading writes into them."""
    tensors = {"model": _trained(trainer.policy.lm), "optimizer": trainer.optimizer.state_dict()}
    if (critic := trainer.critic) is not None:
        tensors |= {"critic": _trained(critic.model), "critic_optimizer": critic.optimizer.state_dict()}
    return tensors


def _trained(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if tensor.requires_grad}


def _clear(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
