"""What a recipe says of training and of the warm start."""

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
    """An update consumes `batch_groups` groups, in micro-batches of at most `micro_batch_tokens` tokens. It is one
    optimizer step; with `minibatches` or `epochs` above 1 it is one for each minibatch of each pass over the batch, and
    weights are published after the last. stop_kl: an update takes no further minibatch once a step's KL from the old
    policy (k3, token mean) is above 1.5 times this. The learning rate warms up over `warmup_steps`, then follows
    `schedule` to `final_learning_rate_ratio` of itself at `decay_steps` (default: `steps`). grad_clip: the global norm.

    compute_dtype: of the passes through the model; master parameters, sums of gradients and the optimizer are float32.
    activation_checkpointing: layers keep their input alone and run again in the backward pass. offload: `all` keeps
    parameters, gradients and optimizer on the host, gathered on the device for the length of an update."""

    batch_groups: int = 64
    minibatches: int = 1
    epochs: int = 1
    stop_kl: float | None = None
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
    activation_checkpointing: bool = False
    offload: str = "none"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_groups", "minibatches", "epochs", "steps", "micro_batch_tokens"):
            check_at_least(f"train.{name}", getattr(self, name), 1)
        if self.minibatches > self.batch_groups:
            raise ValueError(
                f"train.minibatches: {self.minibatches}; at most one a group, batch_groups={self.batch_groups}"
            )
        if self.stop_kl is not None:
            check_positive("train.stop_kl", self.stop_kl)
            if self.num_steps == 1:
                raise ValueError(f"train.stop_kl: {self.stop_kl}; an update of one step cannot stop early")
        for name in ("warmup_steps", "weight_decay"):
            check_at_least(f"train.{name}", getattr(self, name), 0)
        check_positive("train.learning_rate", self.learning_rate)
        check_positive("train.grad_clip", self.grad_clip)
        check_one_of("train.schedule", self.schedule, ("constant", "linear", "cosine"))
        check_one_of("train.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        check_one_of("train.offload", self.offload, ("none", "all"))
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name}: {getattr(self, name)}; must be in [0, 1)")
        if not 0 <= self.final_learning_rate_ratio <= 1:
            raise ValueError(f"train.final_learning_rate_ratio: {self.final_learning_rate_ratio}; must be in [0, 1]")

    @property
    def num_steps(self) -> int:
        """Optimizer steps of an update."""
        return self.minibatches * self.epochs


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """The value model of algorithms that have one. path: where its backbone starts, null for `model.path`; the rest of
    its training (steps, schedule, clipping, dtype, micro-batches) is that of `train`. value_clip: how far a value may
    move from the one at the start of the update before its loss is clipped; null turns that off."""

    path: str | None = None
    learning_rate: float = 1e-5
    warmup_steps: int = 10
    value_clip: float | None = 0.5

    def __post_init__(self) -> None:
        check_positive("critic.learning_rate", self.learning_rate)
        check_at_least("critic.warmup_steps", self.warmup_steps, 0)
        if self.value_clip is not None:
            check_positive("critic.value_clip", self.value_clip)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The frozen model that a KL term measures from. path: null for `model.path`, the model before training. offload:
    `all` keeps it on the host between uses."""

    path: str | None = None
    offload: str = "none"

    def __post_init__(self) -> None:
        check_one_of("reference.offload", self.offload, ("none", "all"))
