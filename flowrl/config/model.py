"""What a recipe says of the model."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from flowrl.config.checks import check_at_least, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class ModelInitConfig:
    """A small Qwen3 to make on the spot when `model.path` does not exist: random weights, a tokenizer of characters.
    rope_theta: base of the rotary positions; short contexts learn faster with a small one. lowercase: the tokenizer
    turns capitals into small letters, for tasks to which they mean nothing."""

    hidden_size: int = 128
    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    intermediate_size: int = 384
    max_tokens: int = 256
    rope_theta: float = 10_000.0
    lowercase: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden_size", "layers", "heads", "kv_heads", "intermediate_size", "max_tokens"):
            check_at_least(f"model.init.{name}", getattr(self, name), 1)
        check_positive("model.init.rope_theta", self.rope_theta)
        if self.hidden_size % self.heads:
            raise ValueError(f"model.init.heads: {self.heads}; must divide model.init.hidden_size={self.hidden_size}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.init.kv_heads: {self.kv_heads}; must divide model.init.heads={self.heads}")


@dataclass(frozen=True, kw_only=True)
class LoRAConfig:
    """Train adapters of this rank and nothing else. Embedded engines are sent the adapters alone and merge them; SGLang
    and weights.transport=collective get merged weights. alpha: the adapters' product counts alpha/rank times. targets:
    the last parts of the names of linear modules in the layers (`q_proj`); null for all. seed: of the first values."""

    rank: int = 16
    alpha: float = 32.0
    targets: list[str] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_at_least("model.lora.rank", self.rank, 1)
        check_positive("model.lora.alpha", self.alpha)
        if self.targets is not None and not self.targets:
            raise ValueError("model.lora.targets: []; name at least one module, or null for all linear ones")
        if importlib.util.find_spec("peft") is None:
            raise ValueError("model.lora: needs the package peft, which is not installed: pip install 'flowrl[lora]'")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """path: a Hugging Face directory. dtype: what engines are served; the trainer keeps float32 masters. lora: train
    low-rank adapters."""

    path: str
    dtype: str = "float32"
    init: ModelInitConfig | None = None
    lora: LoRAConfig | None = None

    def __post_init__(self) -> None:
        check_one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
