"""What engines are measured against: tiny Hugging Face models with random weights, and their own forward."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

VOCABULARY = 128
MAX_MODEL_TOKENS = 1024

# Random weights of the usual size give nearly uniform distributions, in which a wrong context would go unnoticed.
_SHAPE = {"vocab_size": VOCABULARY, "initializer_range": 0.15}
_HEADS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_MODEL_TOKENS,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "qwen3": Qwen3Config(**_SHAPE, **_HEADS, head_dim=32, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**_SHAPE, **_HEADS, tie_word_embeddings=False),
    "qwen2_sliding": Qwen2Config(
        **_SHAPE, **_HEADS, use_sliding_window=True, sliding_window=6, max_window_layers=1, tie_word_embeddings=True
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_SHAPE, **_HEADS, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64
    ),
    "llama": LlamaConfig(**_SHAPE, **_HEADS),
    "gpt2": GPT2Config(
        **_SHAPE, n_embd=64, n_layer=2, n_head=4, n_positions=MAX_MODEL_TOKENS, bos_token_id=None, eos_token_id=None
    ),
}


def write_model(path: Path, seed: int, config: PretrainedConfig = CONFIGS["qwen3"]) -> Path:
    """Saves a model of random weights as a Hugging Face directory."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    return path


def write_tokenizer(path: Path) -> Path:
    """Token i is the two letters `token_text(i)`; nothing stands between them."""
    tokenizer = Tokenizer(models.WordLevel({token_text(token): token for token in range(VOCABULARY)}, token_text(0)))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)
    return path


def token_text(token: int) -> str:
    return chr(ord("a") + token // 16) + chr(ord("k") + token % 16)


@cache
def reference_model(path: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()


def reference_logprobs(path: Path, prompt: tuple[int, ...], response: list[int], temperature: float = 1.0) -> Tensor:
    """Log-probs over the vocabulary at each token of the response: (T, V)."""
    return torch.log_softmax(reference_logits(path, prompt, response) / temperature, dim=-1)


@torch.no_grad()
def reference_logits(path: Path, prompt: tuple[int, ...], response: list[int]) -> Tensor:
    """(T, V)."""
    logits = reference_model(path)(input_ids=torch.tensor([[*prompt, *response]])).logits[0].float()
    return logits[len(prompt) - 1 : -1]
