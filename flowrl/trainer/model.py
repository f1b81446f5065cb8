"""The policy: a Hugging Face causal language model with packed attention, sharded by FSDP2. No loss, no optimizer.

Shapes: N packed tokens; R trained tokens; H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from flowrl.config import LoRAConfig
from flowrl.trainer.attention import ATTENTION_NAME
from flowrl.trainer.logprob import token_logprobs
from flowrl.trainer.packing import Packed
from flowrl.trainer.sharding import recompute_activations, shard
from flowrl.trainer.world import World

if TYPE_CHECKING:
    from flowrl.trainer.lora import MergedModel

# Settings of a configuration that change logits after the head; log-probs here would not be the engine's.
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Policy(nn.Module):
    """Tokens in, log-probs of the trained tokens out: what FSDP shards as one root. `lm` is the model as Hugging Face
    made it, under whose names parameters are saved. has_adapters: whether they alone are trained."""

    def __init__(self, lm: PreTrainedModel, temperature: float, *, has_adapters: bool = False) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature
        self.has_adapters = has_adapters
        # In a tuple: it is no part of what is sharded and trained.
        self._merged: tuple[MergedModel, ...] = ()

    @property
    def published(self) -> nn.Module:
        """What depends on nothing else: `lm` itself or, where it has adapters, merged weights, as they are now."""
        if not self.has_adapters:
            return self.lm
        if not self._merged:
            # Imported here because peft is an extra.
            from flowrl.trainer.lora import MergedModel

            self._merged = (MergedModel(self.lm),)
        self.refresh_published()
        return self._merged[0]

    def refresh_published(self) -> None:
        """On every rank, after parameters have changed, before `published` is read again."""
        for merged in self._merged:
            merged.refresh()

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Passes inside are those of the model that adapters were added to."""
        with ExitStack() as stack:
            if self.has_adapters:
                from flowrl.trainer.lora import switched_off

                stack.enter_context(switched_off(self.lm))
            yield

    def forward(self, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (logprob_R, entropy_R), float32. Logits exist only for trained tokens, a chunk at a time."""
        hidden_RH = hidden_states(self.lm.base_model, packed)
        head = self.lm.get_output_embeddings()
        return token_logprobs(hidden_RH, head.weight, packed.target_R, self.temperature)


def hidden_states(backbone: nn.Module, packed: Packed) -> torch.Tensor:
    """hidden_RH: what the backbone says where a trained token is to be predicted."""
    hidden_1NH = backbone(
        input_ids=packed.token_1N, position_ids=packed.position_1N, layout=packed.layout, use_cache=False
    ).last_hidden_state
    return hidden_1NH[0].index_select(0, packed.source_R)


def load_lm(path: str | Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a Hugging Face directory, on the host, with packed attention and without dropout.

    Raises ValueError for a model whose log-probs this trainer would get wrong.
    """
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=ATTENTION_NAME)
    _refuse_unsupported(lm, path)
    # Evaluation mode: dropout would make the trainer's policy differ from the one that sampled.
    return lm.eval()


def load_policy(
    path: str | Path,
    world: World,
    *,
    compute_dtype: str = "float32",
    temperature: float = 1.0,
    activation_checkpointing: bool = False,
    offload: str = "none",
    lora: LoRAConfig | None = None,
) -> Policy:
    """Loads the directory in float32 and shards it over the world: masters stay float32, compute is in `compute_dtype`.
    The other settings are those of `train` and `model`.

    Raises ValueError for a model whose log-probs this trainer would get wrong.
    """
    policy = Policy(load_lm(path), temperature, has_adapters=lora is not None)
    if lora is not None:
        from flowrl.trainer.lora import add_adapters

        add_adapters(policy.lm, lora)
    policy.to(world.device).eval()
    if activation_checkpointing:
        recompute_activations(policy.lm.base_model)
    shard(policy, policy.lm.base_model, world, compute_dtype=compute_dtype, offload=offload)
    return policy


def _refuse_unsupported(lm: PreTrainedModel, path: str | Path) -> None:
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"model.path: {str(path)!r} has head {head}; it must be a linear layer without bias")
    text_config = lm.config.get_text_config()
    for name in LOGIT_SETTINGS:
        if getattr(text_config, name, None) not in (None, 1.0):
            value = getattr(text_config, name)
            raise ValueError(f"model.path: {str(path)!r} has {name}={value}; logits must be what the head gives")
