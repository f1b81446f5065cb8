"""What a recipe says of training, of the warm start and of published weights."""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.config.checks import check_at_least, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class WarmStartConfig:
    """Supervised steps on demonstrations (the data's answers) before the first rollout, until greedy accuracy on the
    development set (`data.dev`) passes `until_accuracy`, checked every `check_every` steps, or `max_steps` are done."""

    until_accuracy: float = 0.3
    max_steps: int = 400
    check_every: int = 8
    batch_rows: int = 256
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        for name in ("max_steps", "check_every", "batch_rows"):
            check_at_least(f"warm_start.{name}", getattr(self, name), 1)
        check_positive("warm_start.learning_rate", self.learning_rate)
        if not 0 < self.until_accuracy <= 1:
            raise ValueError(f"warm_start.until_accuracy: {self.until_accuracy}; must be in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """An update consumes `batch_groups` groups in one optimizer step, in micro-batches of at most
    `micro_batch_tokens` tokens. The learning rate warms up over `warmup_steps`, then follows `schedule` to
    `final_learning_rate_ratio` of itself at `decay_steps` (default: `steps`). grad_clip: the global norm."""

    batch_groups: int = 64
    steps: int = 100
    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    warmup_steps: int = 10
    schedule: str = "constant"
    decay_steps: int | None = None
    final_learning_rate_ratio: float = 0.1
    micro_batch_tokens: int = 8192
    compute_dtype: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_groups", "steps", "micro_batch_tokens"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        for name in ("warmup_steps", "weight_decay"):
            check_at_least(f"train.{name}", getattr(self, name), 0)
        check_positive("train.learning_rate", self.learning_rate)
        check_positive("train.grad_clip", self.grad_clip)
        check_one_of("train.schedule", self.schedule, ("constant", "linear", "cosine"))
        check_one_of("train.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}: {getattr(self, name)}; must be in [0, 1)")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise ValueError(f"train.final_learning_rate_ratio: {self.final_learning_rate_ratio}; must be in [0, 1]")


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """transport: `shared_memory` (each node's trainer rank writes to the node's tmpfs) or `disk` (a directory, `dir`,
    that all nodes see). buffers: versions kept."""

    transport: str = "shared_memory"
    dir: str | None = None
    buffers: int = 3

    def __post_init__(self) -> None:
        check_one_of("weights.transport", self.transport, ("shared_memory", "disk"))
        check_at_least("weights.buffers", self.buffers, 2)
        if (self.transport == "disk") != (self.dir is not None):
            raise ValueError(f"weights.dir: {self.dir!r}; transport=disk needs it, and only that takes it")
