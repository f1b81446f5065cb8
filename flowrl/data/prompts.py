"""Between text and tokens, by the model's own tokenizer and chat template. Knows no data file and no engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowrl.data.example import Dataset, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """prompts[k] are the token ids of example `indices[k]`. dropped: how many were too long."""

    prompts: list[tuple[int, ...]]
    indices: list[int]
    dropped: int


class PromptEncoder:
    """tokenizer: the model's, as transformers loads it. stop_token_ids: everything that the model's own files call an
    end of sequence, sorted."""

    def __init__(self, model_dir: str | Path, max_prompt_tokens: int) -> None:
        path = Path(model_dir)
        self.max_prompt_tokens = max_prompt_tokens
        self.tokenizer = load_tokenizer(path)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model.path: {str(model_dir)!r}; its tokenizer must have a chat template")
        self.stop_token_ids = stop_token_ids(path, self.tokenizer.eos_token_id)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Through the chat template, up to where the response begins. A string is one user message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_all(self, dataset: Dataset) -> Encoded:
        """As `encode`, the whole set at once; prompts of more than `max_prompt_tokens` are dropped and counted.

        Raises ValueError if none remains.
        """
        if not len(dataset):
            return Encoded([], [], 0)
        conversations = [example.messages for example in dataset]
        texts = self.tokenizer.apply_chat_template(conversations, add_generation_prompt=True, tokenize=False)
        tokens = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
        kept = [index for index, ids in enumerate(tokens) if len(ids) <= self.max_prompt_tokens]
        if not kept:
            raise ValueError(
                f"data.max_prompt_tokens: {self.max_prompt_tokens}; every prompt is longer, the shortest has "
                f"{min(map(len, tokens))} tokens"
            )
        return Encoded([tuple(tokens[index]) for index in kept], kept, len(dataset) - len(kept))

    def encode_response(self, text: str) -> tuple[int, ...]:
        """What the model should say to say `text`: its tokens and the end of sequence."""
        tokens = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return (*tokens, self.tokenizer.eos_token_id)

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Special tokens are left out."""
        return str(self.tokenizer.decode(np.asarray(tokens), skip_special_tokens=True))


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """What `AutoTokenizer` loads. Where the directory names the generic class, that class is imported by itself, in a
    quarter of the time."""
    if _json(path / "tokenizer_config.json").get("tokenizer_class") == "PreTrainedTokenizerFast":
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(path)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(path)


def stop_token_ids(path: Path, tokenizer_eos: int | None) -> tuple[int, ...]:
    """Of generation_config.json, config.json (also under `text_config`) and the tokenizer; each may name several."""
    config = _json(path / "config.json")
    found: set[int] = set()
    for named in (
        _json(path / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        config.get("text_config", {}).get("eos_token_id"),
        tokenizer_eos,
    ):
        found.update(named if isinstance(named, list) else [] if named is None else [named])
    return tuple(sorted(found))


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
