"""How large a recipe's model is: from its directory, or from what the recipe would make. Imports no torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from flowrl.config import LoRAConfig, ModelInitConfig, Recipe
from flowrl.weights.place import adapter_elements, serving_bytes

VOCABULARY_GUESS = 128
"""Of a model that is yet to be made: its tokenizer has one token for each character of the data."""


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """parameters: tied ones once. adapters: elements of those that are trained instead, 0 where there are none.
    context: the most tokens it can see. is_guessed: the model does not exist yet."""

    parameters: int
    adapters: int
    layers: int
    hidden: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocabulary: int
    context: int
    is_guessed: bool

    @property
    def kv_elements_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim


def shape_of(recipe: Recipe) -> ModelShape:
    """Raises ValueError for a directory without config.json or weights."""
    path = Path(recipe.model.path)
    if not path.exists() and recipe.model.init is not None:
        return _to_be_made(recipe)
    file = path / "config.json"
    if not file.is_file():
        raise ValueError(f"model.path: {str(path)!r}; has no config.json, so it is no Hugging Face directory")
    config = json.loads(file.read_text(encoding="utf-8"))
    config = config.get("text_config", config)  # models that also see
    parameters = serving_bytes(path, "bfloat16") // 2
    if parameters == 0:
        raise ValueError(f"model.path: {str(path)!r}; has no *.safetensors")
    hidden = _first(config, "hidden_size", "n_embd")
    heads = _first(config, "num_attention_heads", "n_head")
    return ModelShape(
        parameters=parameters,
        adapters=adapter_elements(path, recipe.model.lora) if recipe.model.lora is not None else 0,
        layers=_first(config, "num_hidden_layers", "n_layer"),
        hidden=hidden,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        intermediate=config.get("intermediate_size") or config.get("n_inner") or 4 * hidden,
        vocabulary=_first(config, "vocab_size"),
        context=_first(config, "max_position_embeddings", "n_positions"),
        is_guessed=False,
    )


def _to_be_made(recipe: Recipe) -> ModelShape:
    init = recipe.model.init
    assert init is not None, "a model to be made says how"
    head_dim = init.hidden_size // init.heads
    kv = init.kv_heads * head_dim
    attention = init.hidden_size * (2 * init.hidden_size + 2 * kv) + 2 * head_dim
    block = attention + 3 * init.hidden_size * init.intermediate_size + 2 * init.hidden_size
    embeddings = 2 * VOCABULARY_GUESS * init.hidden_size
    return ModelShape(
        parameters=init.layers * block + embeddings + init.hidden_size,
        adapters=_adapters_to_be_made(init, recipe.model.lora) if recipe.model.lora is not None else 0,
        layers=init.layers,
        hidden=init.hidden_size,
        kv_heads=init.kv_heads,
        head_dim=head_dim,
        intermediate=init.intermediate_size,
        vocabulary=VOCABULARY_GUESS,
        context=init.max_tokens,
        is_guessed=True,
    )


def _adapters_to_be_made(init: ModelInitConfig, lora: LoRAConfig) -> int:
    hidden, inner, kv = init.hidden_size, init.intermediate_size, init.kv_heads * (init.hidden_size // init.heads)
    widths = {"q_proj": hidden, "k_proj": kv, "v_proj": kv, "o_proj": hidden} | dict.fromkeys(
        ("gate_proj", "up_proj", "down_proj"), inner
    )
    wanted = [width for name, width in widths.items() if lora.targets is None or name in lora.targets]
    return init.layers * lora.rank * sum(hidden + width for width in wanted)


def _first(config: dict[str, int], *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    raise ValueError(f"model.path: config.json has none of {', '.join(names)}")
