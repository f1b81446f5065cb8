"""From sharded parameters to a published version, under the names that the checkpoint on disk has.

A name that the checkpoint does not know is refused: engines skip unknown names silently, and the layer would never be
updated. It knows parameters and files, and neither losses nor queues.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from flowrl.weights.store import WeightStore, companions_of, write_directory
from flowrl.weights.tensorfile import TensorFileLayout, read_shapes

SERVED_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

logger = logging.getLogger(__name__)


class Publisher:
    """Every rank makes one and publishes with it; `store` is None on ranks that only lend their shards.

    lm: the Hugging Face model, sharded or not. model_dir: the directory it came from. `missing`: names that the
    directory has and the model does not, which a published version leaves out.
    """

    def __init__(self, lm: nn.Module, model_dir: Path, store: WeightStore | None, dtype: str) -> None:
        on_disk = shapes_on_disk(model_dir)
        self._tensors = _named_as_on_disk(lm, on_disk, model_dir)
        aliases = set(lm.state_dict(keep_vars=True))
        self.missing = tuple(sorted(set(on_disk) - set(self._tensors) - aliases))
        if self.missing:
            logger.warning("%s: the model does not use %s; published versions lack them", model_dir, self.missing)
        shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._layout = TensorFileLayout(shapes, SERVED_DTYPES[dtype])
        self._companions = companions_of(model_dir)
        self._store = store

    @property
    def num_bytes(self) -> int:
        """Of one version."""
        return self._layout.num_bytes

    def publish(self, version: int) -> Path | None:
        """On every rank, with parameters sharded. Returns the path on ranks that write."""
        if self._store is None:
            self._lend()
            return None
        return self._store.write(version, self._layout, self._full_tensors(), self._companions)

    def export(self, path: Path, *, writes: bool = True) -> None:
        """On every rank: a copy that depends on no other directory, at `path`, which must not exist."""
        if path.exists():
            raise ValueError(f"export: {str(path)!r} exists already")
        if writes:
            write_directory(path, self._layout, self._full_tensors(), self._companions, place=shutil.copyfile)
        else:
            self._lend()

    def full_state(self) -> dict[str, torch.Tensor]:
        """On every rank: all of the model, under the names of the directory. Unsharded tensors are live views."""
        return {name: tensor.detach() for name, tensor in self._full_tensors()}

    def _full_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """One after the other, so that one gathered tensor is alive at a time. An unsharded one is not copied."""
        for name, tensor in self._tensors.items():
            if not isinstance(tensor, DTensor):
                yield name, tensor
            elif tensor.device_mesh.size() == 1:
                yield name, tensor.to_local()
            else:
                yield name, tensor.full_tensor()

    def _lend(self) -> None:
        for _ in self._full_tensors():
            pass


def shapes_on_disk(model_dir: Path) -> dict[str, torch.Size]:
    """Names and shapes of a Hugging Face directory's weights. Raises ValueError if it has no safetensors."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model.path: {str(model_dir)!r} has no safetensors file to take names from")
    return {name: shape for file in files for name, shape in read_shapes(file).items()}


def _named_as_on_disk(lm: nn.Module, on_disk: dict[str, torch.Size], model_dir: Path) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers, tied ones once, under the name of theirs that the directory has."""
    names: dict[int, list[str]] = {}
    tensors = lm.state_dict(keep_vars=True)
    for name, tensor in tensors.items():
        names.setdefault(id(tensor), []).append(name)
    named = {}
    for aliases in names.values():
        known = [name for name in aliases if name in on_disk]
        if not known:
            raise ValueError(f"model.path: {str(model_dir)!r} has no tensor {aliases[0]!r}; engines would skip it")
        tensor = tensors[known[0]]
        if tensor.shape != on_disk[known[0]]:
            shapes = f"{tuple(on_disk[known[0]])} on disk, {tuple(tensor.shape)} in the model"
            raise ValueError(f"model.path: {str(model_dir)!r} has {known[0]!r} of shape {shapes}; must be equal")
        named[known[0]] = tensor
    return named
