"""Floating-point operations that training a model takes, and what cards can do. Of the model, not of the hardware: what
is computed again in the backward pass does not count.

2 a multiply-add, three times over, because the backward pass counts twice; matrices of the decoder layers for every
token, the head for trained tokens alone, attention causal. Embeddings, norms and activations are left out, as usual.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from flowrl.trainer.sharding import decoder_layers

# Dense bfloat16 peak of a card, FLOP/s, by a part of its name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "H800": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class ModelFlops:
    """Of a forward pass: a token, a pair of tokens of which one sees the other, a token that is predicted."""

    token: float
    pair: float
    target: float

    @classmethod
    def of(cls, lm: PreTrainedModel) -> ModelFlops:
        config = lm.config.get_text_config()
        layers = decoder_layers(lm.base_model)
        num_heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // num_heads
        # Of a mixture's experts a token visits a few.
        visited = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
        matrices = sum(
            parameter.numel() * (visited if ".experts." in name else 1.0)
            for name, parameter in layers.named_parameters()
            if parameter.ndim > 1
        )
        return cls(
            token=2 * matrices,
            pair=2 * 2 * num_heads * head_size * len(layers),
            target=2.0 * config.hidden_size * config.vocab_size,
        )

    def training(self, lengths: Sequence[int], num_targets: int) -> float:
        """Of forward and backward passes over rows of these many tokens."""
        pairs = sum(length * (length + 1) // 2 for length in lengths)
        return 3 * (self.token * sum(lengths) + self.pair * pairs + self.target * num_targets)


def peak_flops(device: torch.device) -> float | None:
    """None for a device whose peak is not known here."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
