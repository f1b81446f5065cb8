"""What a recipe says of the model."""

from __future__ import annotations

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
class ModelConfig:
    """path: a Hugging Face directory. dtype: what engines are served; the trainer keeps float32 masters."""

    path: str
    dtype: str = "float32"
    init: ModelInitConfig | None = None

    def __post_init__(self) -> None:
        check_one_of("model.dtype", self.dtype, ("float32", "bfloat16"))
