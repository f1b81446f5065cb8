"""Makes a small model on the spot: an ordinary Hugging Face directory, Qwen3 with random weights and a tokenizer of
characters. For laptops, tests and first runs; knows no training.

Written without torch and transformers, which take longer to import than this takes to run.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from flowrl.config import ModelInitConfig

PAD, BOS, EOS, ANSWER, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>", "<answer>", "<unk>")
MIN_PREFIX_CHARACTERS = 8
WEIGHT_STD = 0.02

# A response follows the <answer> token and ends with <eos>, so a rendered conversation continues its own prompt.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '" + ANSWER + "' + message['content'] + '" + EOS + "' }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '" + ANSWER + "' }}{% endif %}"
)


def create_model(path: Path, init: ModelInitConfig, texts: Iterable[str]) -> None:
    """Writes the directory `path` under a temporary name and renames it. texts: what the tokenizer must be able to say,
    prompts and answers alike.

    Raises ValueError if `path` exists or there is no text.
    """
    if path.exists():
        raise ValueError(f"model.path: {str(path)!r}; exists already, and models are never overwritten")
    if init.lowercase:
        texts = map(str.lower, texts)
    tokenizer = character_tokenizer(sorted(set(texts) - {""}), init.lowercase)
    path.parent.mkdir(parents=True, exist_ok=True)
    making = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        tokenizer.save(str(making / "tokenizer.json"))
        for name, content in _json_files(tokenizer, init).items():
            (making / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        weights = random_weights(init, tokenizer.get_vocab_size())
        save_file(weights, making / "model.safetensors", metadata={"format": "pt"})
        (making / "model.safetensors").chmod(0o644)
        making.chmod(0o755)
        os.rename(making, path)
    except BaseException:
        shutil.rmtree(making)
        raise


def character_tokenizer(texts: Sequence[str], lowercase: bool = False) -> Tokenizer:
    """One token for each character of `texts` (sorted, distinct), and one for the beginning that prompts share.
    lowercase: `texts` are, and the tokenizer makes what it is given so.

    Texts beyond ASCII come from an open alphabet: then characters never seen are spelt in bytes, 256 tokens more.
    Within ASCII they become <unk>.
    """
    if not texts:
        raise ValueError("model.init: no text to make a tokenizer from; the data set is empty")
    characters = sorted(set().union(*texts))
    is_open = not all(text.isascii() for text in texts)
    in_bytes = [f"<0x{byte:02X}>" for byte in range(256)] if is_open else []
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *characters, *in_bytes])}
    tokenizer = Tokenizer(BPE(vocabulary, [], unk_token=UNKNOWN, byte_fallback=is_open))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()]) if is_open else decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    if lowercase:
        tokenizer.normalizer = normalizers.Lowercase()
    prefix = shared_prefix(texts)
    if len(prefix) > MIN_PREFIX_CHARACTERS:
        tokenizer.add_tokens([AddedToken(prefix, normalized=lowercase)])
    return tokenizer


def shared_prefix(texts: Sequence[str]) -> str:
    """Of the beginnings that at least half of `texts` (sorted, distinct) share, the one that as a single token saves
    most characters; "" for a single text. Half, because every prompt may come with its answer."""
    candidates = {_common_beginning(first, second) for first, second in itertools.pairwise(texts)}
    saved = {candidate: len(candidate) * _num_beginning_with(texts, candidate) for candidate in candidates}
    return max(
        (candidate for candidate in candidates if 2 * saved[candidate] >= len(texts) * len(candidate)),
        key=lambda candidate: saved[candidate],
        default="",
    )


def _num_beginning_with(texts: Sequence[str], beginning: str) -> int:
    start = bisect.bisect_left(texts, beginning)
    return bisect.bisect_left(texts, True, start, key=lambda text: not text.startswith(beginning)) - start


def _common_beginning(first: str, last: str) -> str:
    length = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:length]


def random_weights(init: ModelInitConfig, vocabulary_size: int) -> dict[str, np.ndarray]:
    """Float32 arrays by their names on disk, drawn as Hugging Face draws them: normal matrices, norms of ones. Output
    and embedding are not tied: tied ones learn several times more slowly by reinforcement at this size."""
    head = init.hidden_size // init.heads
    queries, keys = init.heads * head, init.kv_heads * head
    hidden, inner = init.hidden_size, init.intermediate_size
    layer: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "self_attn.q_norm": (head,),
        "self_attn.k_norm": (head,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary_size, hidden)}
    for number in range(init.layers):
        shapes |= {f"model.layers.{number}.{name}.weight": shape for name, shape in layer.items()}
    shapes["model.norm.weight"] = (hidden,)
    shapes["lm_head.weight"] = (vocabulary_size, hidden)
    random = np.random.default_rng(init.seed)
    return {
        name: np.ones(shape, np.float32)
        if len(shape) == 1
        else random.standard_normal(shape, np.float32) * np.float32(WEIGHT_STD)
        for name, shape in shapes.items()
    }


def _json_files(tokenizer: Tokenizer, init: ModelInitConfig) -> dict[str, dict[str, Any]]:
    pad, bos, eos = (tokenizer.token_to_id(token) for token in (PAD, BOS, EOS))
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": init.hidden_size,
        "num_hidden_layers": init.layers,
        "num_attention_heads": init.heads,
        "num_key_value_heads": init.kv_heads,
        "head_dim": init.hidden_size // init.heads,
        "intermediate_size": init.intermediate_size,
        "max_position_embeddings": init.max_tokens,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": init.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "initializer_range": WEIGHT_STD,
        "tie_word_embeddings": False,
        "dtype": "float32",
        "pad_token_id": pad,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": init.max_tokens,
        "clean_up_tokenization_spaces": False,
        "pad_token": PAD,
        "bos_token": BOS,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "chat_template": CHAT_TEMPLATE,
    }
    generation = {"pad_token_id": pad, "bos_token_id": bos, "eos_token_id": eos, "do_sample": True}
    return {"config.json": config, "tokenizer_config.json": tokenizer_config, "generation_config.json": generation}
