"""Where a response ends that is to stop at a string. Engines deal in tokens, so this is the text they look at.

A string may begin in one token and end in another, and a character may take several tokens. The response ends with the
token that completes the string: no token is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import AutoTokenizer

Decode = Callable[[Sequence[int]], str]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_TOKENS_PER_CHARACTER = 4  # of a byte-level vocabulary


def load_decode(path: Path) -> Decode:
    """From tokens to text, by the tokenizer in the Hugging Face directory `path`. ValueError if it has none."""
    if not any((path / name).exists() for name in _TOKENIZER_FILES):  # transformers would make one of its own
        names = ", ".join(_TOKENIZER_FILES)
        raise ValueError(f"stop_strings: {path} has no tokenizer to read responses with, none of {names}")
    tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    return lambda tokens: str(tokenizer.decode(list(tokens), skip_special_tokens=False))


def ends_in_stop(tokens: Sequence[int], stops: Sequence[str], decode: Decode, num_new: int = 1) -> bool:
    """Whether the text has one of `stops` near its end. Asked after every `num_new` tokens, it is true as soon as one
    is complete, and reads no more than the longest of them can span."""
    window = _TOKENS_PER_CHARACTER * max(map(len, stops)) + num_new
    text = decode(tokens[-window:])
    return any(stop in text for stop in stops)


def first_stop(tokens: Sequence[int], stops: Sequence[str], decode: Decode) -> int | None:
    """How many tokens there are up to the first that completes one of `stops`; None if none does."""

    def has_stop(count: int) -> bool:
        text = decode(tokens[:count])
        return any(stop in text for stop in stops)

    if not stops or not has_stop(len(tokens)):
        return None
    low, high = 0, len(tokens)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if has_stop(middle) else (middle, high)
    return high
