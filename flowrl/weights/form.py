"""How a version lies on disk: the names and dtypes of its tensors, its file, and what goes beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from flowrl.weights.adapters import ADAPTER_CONFIG, ADAPTER_FILE
from flowrl.weights.names import kinds_on_disk
from flowrl.weights.store import companions_of
from flowrl.weights.tensorfile import WEIGHTS_FILE, Kind


@dataclass(frozen=True)
class Form:
    """kinds: of the tensors that there may be. companions: files to link; texts: files to make, by name."""

    kinds: Mapping[str, Kind]
    companions: tuple[Path, ...]
    file_name: str = WEIGHTS_FILE
    texts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_checkpoint(cls, model_dir: Path) -> Form:
        """A Hugging Face directory like that one. Raises ValueError if it has no safetensors."""
        return cls(kinds_on_disk(model_dir), tuple(companions_of(model_dir)))

    @classmethod
    def of_adapters(cls, tensors: Mapping[str, torch.Tensor], config: str, model_dir: Path) -> Form:
        """What peft keeps of adapters to the model of a directory: tensors under its names, config as it writes it."""
        kinds = {name: Kind(tensor.shape, torch.float32) for name, tensor in tensors.items()}
        return cls(kinds, tuple(companions_of(model_dir)), ADAPTER_FILE, {ADAPTER_CONFIG: config})
