"""The policy: a Hugging Face causal language model with packed attention, sharded by FSDP2. No loss, no optimizer.

Shapes: N packed tokens; R trained tokens; H hidden size.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from transformers import AutoModelForCausalLM, PreTrainedModel

from flowrl.trainer.attention import ATTENTION_NAME
from flowrl.trainer.logprob import token_logprobs
from flowrl.trainer.packing import Packed
from flowrl.trainer.world import World

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Settings of a configuration that change logits after the head; log-probs here would not be the engine's.
LOGIT_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


class Policy(nn.Module):
    """Tokens in, log-probs of the trained tokens out: what FSDP shards as one root. `lm` is the model as Hugging Face
    made it, under whose names parameters are saved and published."""

    def __init__(self, lm: PreTrainedModel, temperature: float) -> None:
        super().__init__()
        self.lm = lm
        self.temperature = temperature

    def forward(self, packed: Packed) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns (logprob_R, entropy_R), float32. Logits exist only for trained tokens, a chunk at a time."""
        hidden_1NH = self.lm.base_model(
            input_ids=packed.token_1N, position_ids=packed.position_1N, layout=packed.layout, use_cache=False
        ).last_hidden_state
        hidden_RH = hidden_1NH[0].index_select(0, packed.source_R)
        head = self.lm.get_output_embeddings()
        return token_logprobs(hidden_RH, head.weight, packed.target_R, self.temperature)


def load_policy(path: str | Path, world: World, *, compute_dtype: str = "float32", temperature: float = 1.0) -> Policy:
    """Loads the directory in float32 and shards it over the world: masters stay float32, compute is in `compute_dtype`.

    Raises ValueError for a model whose log-probs this trainer would get wrong.
    """
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=ATTENTION_NAME)
    _refuse_unsupported(lm, path)
    # Evaluation mode: dropout would make the trainer's policy differ from the one that sampled.
    policy = Policy(lm, temperature).to(world.device).eval()
    shard(policy, world, COMPUTE_DTYPES[compute_dtype])
    return policy


def shard(policy: Policy, world: World, compute_dtype: torch.dtype) -> None:
    """FSDP2 on each decoder layer, then on the rest. Gradients are summed over ranks in float32, never averaged: their
    denominator is known only at the end of the update."""
    is_float32 = compute_dtype == torch.float32
    precision = MixedPrecisionPolicy(
        param_dtype=None if is_float32 else compute_dtype,
        reduce_dtype=None if is_float32 else torch.float32,
    )
    for layer in policy.lm.base_model.get_submodule("layers").children():
        fully_shard(layer, mesh=world.mesh, mp_policy=precision)
    fully_shard(policy, mesh=world.mesh, mp_policy=precision)
    for module in fsdp_modules(policy):
        # Neither setter recurses; gloo has no scaled sum, hence the second.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def fsdp_modules(policy: Policy) -> list[FSDPModule]:
    """The root first, as their first unsharding requires."""
    return [module for module in policy.modules() if isinstance(module, FSDPModule)]


def _refuse_unsupported(lm: PreTrainedModel, path: str | Path) -> None:
    head = lm.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"model.path: {str(path)!r} has head {head}; it must be a linear layer without bias")
    if not hasattr(lm.base_model, "layers"):
        raise ValueError(f"model.path: {str(path)!r} is a {type(lm).__name__}, whose base has no `layers` to shard")
    text_config = lm.config.get_text_config()
    for name in LOGIT_SETTINGS:
        if getattr(text_config, name, None) not in (None, 1.0):
            value = getattr(text_config, name)
            raise ValueError(f"model.path: {str(path)!r} has {name}={value}; logits must be what the head gives")
