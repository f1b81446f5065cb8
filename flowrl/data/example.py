"""What a data set holds: examples. Knows no file, no tokenizer and no reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

Message = dict[str, str]
Prompt = str | list[Message]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One prompt and what its reward needs.

    index: position in the data set that holds it. prompt: messages, or a string that stands for one user message.
    demonstration: a response worth imitating, where the data has one. origin: where a person finds it, `file:line`.
    """

    index: int
    prompt: Prompt
    data_source: str
    ground_truth: Any
    extra_info: Mapping[str, Any] = field(default_factory=dict)
    demonstration: str | None = None
    origin: str = ""

    @property
    def messages(self) -> list[Message]:
        return [{"role": "user", "content": self.prompt}] if isinstance(self.prompt, str) else self.prompt

    @property
    def text(self) -> str:
        """All that the prompt says, without a template: equal for equal prompts."""
        return self.prompt if isinstance(self.prompt, str) else "\n".join(m["content"] for m in self.prompt)


class Dataset(Sequence[Example]):
    """Examples in a fixed order: `dataset[i].index == i`, whatever they were taken from."""

    def __init__(self, examples: Iterable[Example]) -> None:
        self._examples = [
            example if example.index == index else dataclasses.replace(example, index=index)
            for index, example in enumerate(examples)
        ]

    def __len__(self) -> int:
        return len(self._examples)

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> Dataset: ...

    def __getitem__(self, index: int | slice) -> Example | Dataset:
        return Dataset(self._examples[index]) if isinstance(index, slice) else self._examples[index]
