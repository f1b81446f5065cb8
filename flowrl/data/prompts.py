"""Between text and tokens, by the model's own tokenizer and chat template. Knows no data file and no engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowrl.data.example import Dataset, Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for what the model wrote, where a template is asked what it puts behind it.
RESPONSE = "«response»"


@dataclass(frozen=True)
class Encoded:
    """prompts[k] are the token ids of example `indices[k]`. dropped: how many were too long."""

    prompts: list[tuple[int, ...]]
    indices: list[int]
    dropped: int


class PromptEncoder:
    """tokenizer: the model's, as transformers loads it. stop_token_ids: everything that the model's own files call an
    end of sequence, sorted. tools: JSON schemas that the chat template shows the model before every prompt."""

    def __init__(self, model_dir: str | Path, max_prompt_tokens: int, tools: Sequence[dict[str, Any]] = ()) -> None:
        path = Path(model_dir)
        self.max_prompt_tokens = max_prompt_tokens
        self.tools: Any = list(tools) or None
        self.tokenizer = load_tokenizer(path)
        if self.tokenizer.chat_template is None:
            raise ValueError(f"model.path: {str(model_dir)!r}; its tokenizer must have a chat template")
        self.stop_token_ids = stop_token_ids(path, self.tokenizer.eos_token_id)

    def encode(self, prompt: Prompt) -> tuple[int, ...]:
        """Through the chat template, up to where the response begins. A string is one user message."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        text = self._render(messages)
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def encode_all(self, dataset: Dataset) -> Encoded:
        """As `encode`, the whole set at once; prompts of more than `max_prompt_tokens` are dropped and counted.

        Raises ValueError if none remains.
        """
        if not len(dataset):
            return Encoded([], [], 0)
        conversations = [example.messages for example in dataset]
        texts = self._render(conversations)
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

    def encode_reply(self, messages: Sequence[Message], last_token: int) -> tuple[int, ...]:
        """What follows a response of the model's that ended with `last_token`: the messages that answer it, up to where
        the next response begins. Special tokens that stand in a message's text are left out: only the template says
        them. Raises ValueError for a template that refuses such messages."""
        said = [{**message, "content": self._without_special(message["content"])} for message in messages]
        conversation = [{"role": "user", "content": "…"}, {"role": "assistant", "content": RESPONSE}, *said]
        try:
            text = self._render(conversation)
        except Exception as error:  # templates raise what they like
            roles = ", ".join(sorted({message["role"] for message in messages}))
            raise ValueError(f"model.path: its chat template refuses messages of role {roles}: {error}") from error
        _, found, after = text.partition(RESPONSE)
        assert found, "a chat template shows what the assistant said"
        tokens = tuple(self.tokenizer(after, add_special_tokens=False)["input_ids"])
        return tokens[1:] if tokens[:1] == (last_token,) else tokens

    def decode_turn(self, tokens: Sequence[int] | np.ndarray) -> str:
        """All that the model wrote, special tokens too (some mark a tool call), but for the one that ended it."""
        ids = np.asarray(tokens)
        ids = ids[:-1] if len(ids) and int(ids[-1]) in self.stop_token_ids else ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))

    def truncate(self, text: str, max_tokens: int) -> str:
        """The beginning of `text`, and a mark where it was cut."""
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return text if len(tokens) <= max_tokens else f"{self.decode(tokens[:max_tokens])} [cut]"

    def decode(self, tokens: Sequence[int] | np.ndarray) -> str:
        """Special tokens are left out."""
        return str(self.tokenizer.decode(np.asarray(tokens), skip_special_tokens=True))

    def _render(self, messages: Any) -> Any:
        return self.tokenizer.apply_chat_template(
            messages, tools=self.tools, add_generation_prompt=True, tokenize=False
        )

    def _without_special(self, text: str) -> str:
        for special in self.tokenizer.all_special_tokens:
            text = text.replace(special, "")
        return text


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
