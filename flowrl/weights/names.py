"""Which tensors of a checkpoint on disk a module's tensor stands for, and where in it each lies.

Engines skip names that they do not know, and the layer would never be updated; so a tensor that the directory does not
name is refused. Since version 5 transformers keeps the experts of a layer in one tensor, where the disk has one for
each. What byte ranges cannot express (a transpose) is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from flowrl.weights.tensorfile import Kind, read_slots

_FUSED = re.compile(r"(.+\.experts)\.(gate_up_proj|down_proj)")
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


class Extent(NamedTuple):
    """A tensor on disk: `begin` is its first element among those of the module's tensor, row by row."""

    name: str
    shape: torch.Size
    begin: int


def kinds_on_disk(model_dir: Path) -> dict[str, Kind]:
    """Tensors of a Hugging Face directory. Raises ValueError if it has no safetensors."""
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise ValueError(f"model.path: {str(model_dir)!r} has no safetensors file to take names from")
    return {name: slot.kind for file in files for name, slot in read_slots(file).items()}


def extents_on_disk(
    tensors: Mapping[str, torch.Tensor], on_disk: Mapping[str, Kind], where: object
) -> dict[str, tuple[Extent, ...]]:
    """For each distinct tensor, under that name of its own that the disk has (tied ones once), in the order of
    `tensors`. They follow one another and cover it. Raises ValueError naming the tensor that cannot be placed."""
    aliases: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        aliases.setdefault(id(tensor), []).append(name)
    found: dict[str, tuple[Extent, ...]] = {}
    for names in aliases.values():
        shape = tensors[names[0]].shape
        known = [name for name in names if name in on_disk]
        if known:
            found[known[0]] = (Extent(known[0], shape, 0),)
            _refuse_other_shape(known[0], on_disk[known[0]].shape, shape, where)
        else:
            found[names[0]] = _experts(names[0], shape, on_disk, where)
    return found


def _experts(name: str, shape: torch.Size, on_disk: Mapping[str, Kind], where: object) -> tuple[Extent, ...]:
    """Of a tensor (experts, rows, columns) each expert's rows are one tensor on disk, or gate's and then up's."""
    match = _FUSED.fullmatch(name)
    if match is None or len(shape) != 3:
        raise ValueError(f"model.path: {str(where)!r} has no tensor {name!r}; engines would skip it")
    parts = _PARTS[match[2]]
    part_shape = torch.Size((shape[1] // len(parts), shape[2]))
    extents: list[Extent] = []
    for expert in range(shape[0]):
        for part in parts:
            on_disk_name = f"{match[1]}.{expert}.{part}.weight"
            if on_disk_name not in on_disk:
                raise ValueError(
                    f"model.path: {str(where)!r} has neither {name!r} nor {on_disk_name!r}; engines would skip it"
                )
            _refuse_other_shape(on_disk_name, on_disk[on_disk_name].shape, part_shape, where)
            extents.append(Extent(on_disk_name, part_shape, len(extents) * part_shape.numel()))
    if len(extents) * part_shape.numel() != shape.numel():
        raise ValueError(f"model.path: {str(where)!r}: {name!r} of shape {tuple(shape)} has rows that no expert has")
    return tuple(extents)


def _refuse_other_shape(name: str, disk: torch.Size, module: torch.Size, where: object) -> None:
    if disk == module:
        return
    transposed = "; a transpose cannot be written as byte ranges" if disk == module[::-1] else ""
    raise ValueError(
        f"model.path: {str(where)!r} has {name!r} of shape {tuple(disk)} on disk, {tuple(module)} in the model; "
        f"must be equal{transposed}"
    )
