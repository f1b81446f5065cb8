"""What a recipe says of prompts and of evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowrl.config.checks import check_at_least, check_one_of


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts. source: `auto` reads the file at `path` (JSONL or parquet, GSM8K's own columns too); `reasoning_gym`
    draws `size` items of `task`, keeps the distinct ones, and sets `held_out` and `dev` of them apart by `seed`."""

    path: str | None = None
    source: str = "auto"
    task: str | None = None
    size: int = 10_000
    options: dict[str, Any] = field(default_factory=dict)
    held_out: int = 0
    dev: int = 0
    seed: int = 0
    max_prompt_tokens: int = 1024

    def __post_init__(self) -> None:
        check_one_of("data.source", self.source, ("auto", "reasoning_gym"))
        if self.source == "auto" and self.path is None:
            raise ValueError("data.path: missing; name a JSONL or parquet file, or set data.source=reasoning_gym")
        if self.source == "reasoning_gym" and self.task is None:
            raise ValueError("data.task: missing; data.source=reasoning_gym needs the name of a task")
        for name in ("size", "max_prompt_tokens"):
            check_at_least(f"data.{name}", getattr(self, name), 1)
        for name in ("held_out", "dev"):
            check_at_least(f"data.{name}", getattr(self, name), 0)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation of every `every`-th version, the first and the last. path: a file like `data.path`; without one, the
    prompts that `data.held_out` set apart. limit: at most so many prompts. Never delays training."""

    path: str | None = None
    every: int = 100
    samples: int = 1
    temperature: float = 0.0
    limit: int = 1000

    def __post_init__(self) -> None:
        for name in ("every", "samples", "limit"):
            check_at_least(f"eval.{name}", getattr(self, name), 1)
        check_at_least("eval.temperature", self.temperature, 0)
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"eval.samples: {self.samples}; greedy samples are all alike, set eval.temperature above 0"
            )
