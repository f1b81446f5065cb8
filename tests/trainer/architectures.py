"""A tiny random model of each architecture that the trainer promises to get right."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.trainer.cases import VOCABULARY

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}


def _models() -> dict[str, PreTrainedModel]:
    gpt2 = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=None, eos_token_id=1
    )
    return {
        "gpt2": GPT2LMHeadModel(gpt2),
        "llama": LlamaForCausalLM(LlamaConfig(**COMMON, tie_word_embeddings=False)),
        "qwen2": Qwen2ForCausalLM(Qwen2Config(**COMMON, tie_word_embeddings=True)),
        "qwen3": Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=False)),
        "other": Qwen3ForCausalLM(Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=False)),
        "qwen3_moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**COMMON, **EXPERTS, head_dim=8, tie_word_embeddings=False)),
    }


ARCHITECTURES = ("gpt2", "llama", "qwen2", "qwen3", "qwen3_moe")


def make_architectures(directory: Path) -> Path:
    """directory/NAME for each of them, and directory/other, to be a reference that differs. Biases and norms are drawn
    too: at 0 and 1 a mistake in them would not show."""
    torch.manual_seed(0)
    for name, model in _models().items():
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        model.save_pretrained(directory / name)
    return directory
