"""Versions of a run that trains adapters: the adapters alone, in the layout of peft, for a model that never changes.

    adapter_config.json            says which model, rank and alpha
    adapter_model.safetensors      A (rank, in) and B (out, rank) of each adapted matrix, float32

Whoever serves one keeps a whole model and puts W + B·A·alpha/rank in the place of each adapted matrix, in float32 and
rounded once, from the W of the checkpoint's own files. Those are mapped for as long as it takes: what they cost is
page cache, which the engines of a node share.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."
_CHUNK_ELEMENTS = 1 << 18
A, B = ".lora_A.weight", ".lora_B.weight"


class AdapterConfig(msgspec.Struct, frozen=True):
    """What is needed of peft's."""

    base_model_name_or_path: str
    r: int
    lora_alpha: float
    fan_in_fan_out: bool = False


def is_adapter(path: Path) -> bool:
    return (path / ADAPTER_CONFIG).is_file()


def read_config(path: Path) -> AdapterConfig:
    return msgspec.json.decode((path / ADAPTER_CONFIG).read_bytes(), type=AdapterConfig)


@torch.no_grad()
def merge_in_place(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Overwrites the adapted ones of `tensors`, a state dict with `keep_vars=True` whose others are the checkpoint's.

    Raises ValueError, with nothing overwritten, if they do not fit; FileNotFoundError if the version or the checkpoint
    has gone.
    """
    config = read_config(path)
    adapters = _read(path / ADAPTER_FILE)
    bases = _Checkpoint(Path(config.base_model_name_or_path))
    names = sorted(name.removeprefix(PREFIX).removesuffix(A) for name in adapters if name.endswith(A))
    if len(adapters) != 2 * len(names):
        raise ValueError(f"weights: {path} has tensors that are neither A nor B of an adapter")
    pairs = {f"{name}.weight": (adapters[f"{PREFIX}{name}{A}"], adapters[f"{PREFIX}{name}{B}"]) for name in names}
    for name, (a_RI, b_OR) in pairs.items():
        wanted = (a_RI.shape[1], b_OR.shape[0]) if config.fan_in_fan_out else (b_OR.shape[0], a_RI.shape[1])
        if name not in tensors or tuple(tensors[name].shape) != wanted or bases.shape(name) != wanted:
            raise ValueError(f"weights: {path} adapts {name} of shape {wanted}, which the model or its base lacks")
    for name, (a_RI, b_OR) in pairs.items():
        left_MR, right_RN = (a_RI.T, b_OR.T) if config.fan_in_fan_out else (b_OR, a_RI)
        _merge(tensors[name], bases.tensor(name), left_MR, right_RN, config.lora_alpha / config.r)


def _merge(
    target_MN: torch.Tensor, base_MN: torch.Tensor, left_MR: torch.Tensor, right_RN: torch.Tensor, scale: float
) -> None:
    """A few rows at a time, so that what lies between base and target stays in the cache."""
    device = target_MN.device
    right_RN = right_RN.to(device)
    each = max(1, _CHUNK_ELEMENTS // target_MN.shape[1])
    scratch = torch.empty(min(each, len(target_MN)), target_MN.shape[1], dtype=torch.float32, device=device)
    for begin in range(0, len(target_MN), each):
        rows = slice(begin, begin + each)
        part = scratch[: len(target_MN[rows])]
        torch.mm(left_MR[rows].to(device), right_RN, out=part)
        target_MN[rows].copy_(part.mul_(scale).add_(base_MN[rows].to(device)))


def _read(file: Path) -> dict[str, torch.Tensor]:
    """Copies: a file that is mapped cannot be used again by its writer."""
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118


class _Checkpoint:
    """The model that adapters belong to, as it lies on disk."""

    def __init__(self, path: Path) -> None:
        files = [safe_open(file, framework="pt") for file in sorted(path.glob("*.safetensors"))]
        if not files:
            raise FileNotFoundError(f"{path}: no *.safetensors of the model that adapters belong to")
        self._where: dict[str, Any] = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape()) if name in self._where else ()

    def tensor(self, name: str) -> torch.Tensor:
        found: torch.Tensor = self._where[name].get_tensor(name)
        return found
