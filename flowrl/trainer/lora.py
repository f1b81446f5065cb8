"""Low-rank adapters by peft: which parameters are trained, and the merged weights that engines are served.

Adapters are injected into the Hugging Face model in place. Merged weights, W + B·A·alpha/rank, bear the names of the
checkpoint; they are sharded as the model is, and no rank ever holds a whole matrix.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from flowrl.config import LoRAConfig

ADAPTER = "default"


def add_adapters(lm: PreTrainedModel, lora: LoRAConfig) -> None:
    """Before sharding: freezes the model and adds adapters, which start as no change. Their values come from torch's
    seed, so ranks must share it.

    Raises ValueError if no module has the name of a target.
    """
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules="all-linear" if lora.targets is None else list(lora.targets),
        # Without dropout: the policy that trains must be the one that samples.
        lora_dropout=0.0,
        # How GPT-2 stores its matrices.
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in lm.modules()),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(lora.seed)
        try:
            inject_adapter_in_model(settings, lm, adapter_name=ADAPTER)
        except ValueError as error:
            raise ValueError(f"model.lora.targets: {lora.targets}; {error}") from error


class MergedModel(nn.Module):
    """What is published of a model with adapters: a state dict of the model without them. Unadapted tensors are the
    model's, adapted ones are copies that `refresh` brings up to date."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self._layers = {name: module for name, module in lm.named_modules() if isinstance(module, LoraLayer)}
        self._merged = {
            f"{name}.weight": layer.get_base_layer().weight.detach().clone() for name, layer in self._layers.items()
        }
        self._tensors = {
            name: self._merged.get(name, tensor)
            for key, tensor in lm.state_dict(keep_vars=True).items()
            if ".lora_" not in key
            for name in (key.replace(".base_layer.", "."),)
        }

    @torch.no_grad()
    def refresh(self) -> None:
        """On every rank, with parameters sharded."""
        for name, layer in self._layers.items():
            base = layer.get_base_layer().weight
            self._merged[f"{name}.weight"].copy_(base + layer.get_delta_weight(ADAPTER))

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        """Live tensors, whatever is asked for."""
        return dict(self._tensors)
