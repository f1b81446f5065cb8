"""Low-rank adapters by peft: which parameters are trained, and what engines are served: adapters, or merged weights.

Adapters are injected into the Hugging Face model in place. Merged weights, W + B·A·alpha/rank, bear the names of the
checkpoint; they are sharded as the model is, and no rank ever holds a whole matrix. They are made when first wanted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flowrl.config import LoRAConfig
from flowrl.trainer.sharding import decoder_layers
from flowrl.weights.adapters import PREFIX

ADAPTER = "default"


def add_adapters(lm: PreTrainedModel, lora: LoRAConfig) -> None:
    """Before sharding: freezes the model and adds adapters, which start as no change. Their values come from torch's
    seed, so ranks must share it.

    Raises ValueError for a target that no linear module of a decoder layer is called.
    """
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # peft divides it by r, and does no more
        target_modules=_targets(lm, lora.targets),
        # Without dropout: the policy that trains must be the one that samples.
        lora_dropout=0.0,
        # How GPT-2 stores its matrices.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        inject_adapter_in_model(settings, lm, adapter_name=ADAPTER)


def _targets(lm: PreTrainedModel, wanted: list[str] | None) -> list[str]:
    """Full names of linear modules in decoder layers. Chosen here, because what peft makes of fused experts could not
    be published under the names of the checkpoint."""
    layers = decoder_layers(lm.base_model)
    inside = {id(module) for module in layers.modules()}
    linear = [
        name for name, module in lm.named_modules() if id(module) in inside and isinstance(module, nn.Linear | Conv1D)
    ]
    found = [name for name in linear if wanted is None or name.rpartition(".")[2] in wanted]
    missing = set(wanted or ()) - {name.rpartition(".")[2] for name in found}
    if missing or not found:
        known = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        raise ValueError(f"model.lora.targets: {sorted(missing)}; linear modules of this model's layers are {known}")
    return found


@contextmanager
def switched_off(lm: nn.Module) -> Iterator[None]:
    """Adapted layers inside are what they were without."""
    layers: list[Any] = [module for module in lm.modules() if isinstance(module, LoraLayer)]
    # Not peft's own switch, which also turns requires_grad off and on, here in the middle of an accumulation.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


class AdapterModel(nn.Module):
    """What is published where engines merge for themselves: the adapters alone, under peft's names. Its tensors are
    those that are trained, sharded as they are."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self._tensors = {
            PREFIX + name.replace(f".{ADAPTER}.", "."): tensor
            for name, tensor in lm.named_parameters()
            if ".lora_" in name
        }

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Live tensors, whatever is asked for."""
        return dict(self._tensors)


def adapter_config(lm: PreTrainedModel, model_dir: Path) -> str:
    """As peft writes it, for the model of that directory."""
    settings: Any = lm.peft_config
    found = settings[ADAPTER].to_dict() | {
        "base_model_name_or_path": str(model_dir.resolve()),
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    return json.dumps({name: sorted(value) if isinstance(value, set) else value for name, value in found.items()})


class MergedModel(nn.Module):
    """What is published of a model with adapters: a state dict of the model without them. Unadapted tensors are the
    model's, adapted ones are copies that `refresh` brings up to date."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        # Each adapted layer, under the name of what it replaced, is a module of peft's with a delta weight.
        self._layers: dict[str, Any] = {
            name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)
        }
        self._merged: dict[str, torch.Tensor] = {
            f"{name}.weight": layer.get_base_layer().weight.detach().clone() for name, layer in self._layers.items()
        }
        self._tensors = {
            name: self._merged.get(name, tensor)
            for key, tensor in lm.state_dict(keep_vars=True).items()
            if ".lora_" not in key
            for name in (key.replace(".base_layer.", "."),)
        }
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """On every rank, with parameters sharded."""
        for name, layer in self._layers.items():
            base = layer.get_base_layer().weight
            self._merged[f"{name}.weight"].copy_(base + layer.get_delta_weight(ADAPTER))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Live tensors, whatever is asked for."""
        return dict(self._tensors)
