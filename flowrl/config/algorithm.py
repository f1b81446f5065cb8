"""What a recipe says of the algorithm and of staleness."""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.config.checks import check_at_least, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """name: `grpo` (advantages within the group), `dr_grpo` (not divided by the group's spread).
    clip_low, clip_high, dual_clip: of the PPO ratio to the policy that sampled; dual_clip null turns it off.
    aggregate: how token losses become one number. skip_tied: leave out of the forward pass the rows whose advantage is
    zero; gradient and denominators stay the same."""

    name: str = "grpo"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float | None = 3.0
    aggregate: str = "token-mean"
    skip_tied: bool = True

    def __post_init__(self) -> None:
        check_one_of("algorithm.name", self.name, ("grpo", "dr_grpo"))
        modes = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
        check_one_of("algorithm.aggregate", self.aggregate, modes)
        check_positive("algorithm.clip_low", self.clip_low)
        check_positive("algorithm.clip_high", self.clip_high)
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"algorithm.dual_clip: {self.dual_clip}; must be above 1, or null")


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """max: no token is consumed that is older by more updates; 0 is synchronous. late: what happens when unready rows
    that are due hold ready ones up: `wait` for them, or `drop` them and sample their prompts anew."""

    max: int = 2
    late: str = "wait"

    def __post_init__(self) -> None:
        check_at_least("staleness.max", self.max, 0)
        check_one_of("staleness.late", self.late, ("wait", "drop"))
