"""What a recipe says of rollout and of rewards."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowrl.config.checks import check_at_least, check_dotted, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """engine: `embedded` (PyTorch, in the worker) or `sglang` (servers). in_flight: what a weight update does to the KV
    of running responses: `keep` or `recompute` it. concurrency: groups an engine works on at once. server_args and
    python are SGLang's: arguments by their own names, and the interpreter that has it installed."""

    engine: str = "embedded"
    group_size: int = 8
    temperature: float = 1.0
    max_tokens: int = 256
    concurrency: int = 64
    in_flight: str = "keep"
    episode: str = "flowrl.rollout.episodes:single_turn"
    server_args: dict[str, Any] = field(default_factory=dict)
    python: str | None = None

    def __post_init__(self) -> None:
        check_one_of("rollout.engine", self.engine, ("embedded", "sglang"))
        check_one_of("rollout.in_flight", self.in_flight, ("keep", "recompute"))
        for name in ("group_size", "max_tokens", "concurrency"):
            check_at_least(f"rollout.{name}", getattr(self, name), 1)
        check_positive("rollout.temperature", self.temperature)
        check_dotted("rollout.episode", self.episode)


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """name: a reward of ours. path: yours, `file.py:function` or `package.module:function`, taking
    `(data_source, solution_str, ground_truth, extra_info)`. One of the two."""

    name: str | None = None
    path: str | None = None

    def __post_init__(self) -> None:
        if (self.name is None) == (self.path is None):
            raise ValueError(f"reward: name={self.name!r}, path={self.path!r}; exactly one of the two must be given")
        if self.path is not None:
            check_dotted("reward.path", self.path)
