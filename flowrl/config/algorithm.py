"""What a recipe says of the algorithm and of staleness. What each part computes: docs/algorithms.md."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowrl.algorithms.declarations import (
    ADVANTAGES,
    LOSSES,
    Anchor,
    Scope,
    Streaming,
    check_aggregation,
    check_policies,
    streaming,
)
from flowrl.config.checks import check_at_least, check_dotted, check_one_of, check_positive
from transfer_queue.policies import late_policy

ANCHORS = {"rollout": Anchor.ROLLOUT, "recomputed": Anchor.RECOMPUTED, "loglinear": Anchor.RECOMPUTED}
CLIPS = {"lo": "clip_low", "hi": "clip_high", "c": "dual_clip"}


@dataclass(frozen=True, kw_only=True)
class CorrectionConfig:
    """The weight w = exp(old - rollout), or the own w of decoupled_ppo and segment_ppo. mode: `truncate` to high (TIS),
    `clip` to [low, high], `mask` what is outside (IcePop). level: `token`, `sequence`, or `geometric`. low, high: null
    for the mode's own bounds."""

    mode: str = "truncate"
    level: str = "token"
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_one_of("algorithm.correction.mode", self.mode, ("truncate", "clip", "mask"))
        check_one_of("algorithm.correction.level", self.level, ("token", "sequence", "geometric"))
        for name in ("low", "high"):
            bound = getattr(self, name)
            if bound is not None:
                check_at_least(f"algorithm.correction.{name}", bound, 0)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"algorithm.correction.low: {self.low}; must not exceed high={self.high}")
        if self.mode == "truncate" and self.low:
            raise ValueError(f"algorithm.correction.low: {self.low}; truncate has no lower bound, clip has")


@dataclass(frozen=True, kw_only=True)
class KLConfig:
    """Distance from the reference policy (`reference`). place: `reward` (off the score, token by token) or `loss`.
    target: null keeps `coef`; otherwise it is adapted towards that KL, over `horizon` samples."""

    coef: float = 0.001
    estimator: str = "k3"
    place: str = "loss"
    target: float | None = None
    horizon: int = 10_000

    def __post_init__(self) -> None:
        check_positive("algorithm.kl.coef", self.coef)
        check_one_of("algorithm.kl.estimator", self.estimator, ("k1", "k2", "k3", "k3_plus"))
        check_one_of("algorithm.kl.place", self.place, ("reward", "loss"))
        check_at_least("algorithm.kl.horizon", self.horizon, 1)
        if self.target is not None:
            check_positive("algorithm.kl.target", self.target)
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError("algorithm.kl.estimator: 'k1'; in the loss its gradient is 0 on average, use k2 or k3")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """name: a preset (docs/algorithms.md has the table); it says what the other fields are where a recipe does not.

    advantage, loss: names, or functions of yours by dotted path. advantage_settings, loss_settings: their other
    arguments; for gdpo `weights`, what each score weighs, by its name in what the reward function gives (`score`: the
    reward itself). clip_low, clip_high: how far the ratio may leave 1; dual_clip: how far where A < 0; null leaves a
    side open. aggregate: how token losses become one number; horizon: what seq-mean-token-sum-norm divides by, null for
    `rollout.max_tokens`.
    old: the anchor of the ratio: `rollout` (what sampled the token), `recomputed` (the trainer's policy before the
    update), `loglinear` (a stand-in for it, between the two).
    correction: of tokens that another policy sampled. opsm: δ above which a row with A < 0 is left out. m2po: τ, the
    second moment of log-ratios that is kept. kl, entropy_coef: terms beside the policy loss. overlong_buffer: tokens
    before `rollout.max_tokens` over which the score sinks by up to 1; 0 is off.
    skip_tied: leave out of the forward pass the rows whose advantage is zero, where that changes nothing else."""

    name: str = "grpo"
    advantage: str = "grpo"
    advantage_settings: dict[str, Any] = field(default_factory=dict)
    loss: str = "ppo"
    loss_settings: dict[str, Any] = field(default_factory=dict)
    clip_low: float | None = 0.2
    clip_high: float | None = 0.28
    dual_clip: float | None = 3.0
    aggregate: str = "token-mean"
    horizon: int | None = None
    old: str = "rollout"
    correction: CorrectionConfig | None = None
    opsm: float | None = None
    m2po: float | None = None
    kl: KLConfig | None = None
    entropy_coef: float = 0.0
    overlong_buffer: int = 0
    skip_tied: bool = True

    def __post_init__(self) -> None:
        self._check_parts()
        self._check_clips()
        self._check_corrections()
        check_at_least("algorithm.entropy_coef", self.entropy_coef, 0)
        check_at_least("algorithm.overlong_buffer", self.overlong_buffer, 0)
        if self.horizon is not None:
            check_at_least("algorithm.horizon", self.horizon, 1)

    @property
    def has_own_loss(self) -> bool:
        """The loss is the user's."""
        return ":" in self.loss

    @property
    def has_own_advantage(self) -> bool:
        return ":" in self.advantage

    @property
    def has_critic(self) -> bool:
        return self.advantage == "gae"

    @property
    def has_greedy_baseline(self) -> bool:
        """A greedy response to every prompt, beside those that are trained on."""
        return self.advantage == "remax"

    @property
    def score_weights(self) -> dict[str, float]:
        """By the names of the scores that a sample's advantage is made of; empty where there is one reward."""
        return {name: float(weight) for name, weight in self.advantage_settings.get("weights", {}).items()}

    @property
    def has_weight_in_loss(self) -> bool:
        return not self.has_own_loss and LOSSES[self.loss].has_own_weight

    @property
    def scope(self) -> Scope:
        """A function of the user's sees whole groups."""
        return Scope.GROUP if self.has_own_advantage else ADVANTAGES[self.advantage].scope

    @property
    def has_terms_without_advantage(self) -> bool:
        """Something beside the policy loss, or a policy loss of which nothing is known."""
        return self.has_own_loss or self.entropy_coef > 0 or (self.kl is not None and self.kl.place == "loss")

    @property
    def estimates_in_trainer(self) -> bool:
        """Advantages need the whole batch, or models that only the trainer has; otherwise a stage computes them."""
        return self.scope is Scope.BATCH or (self.kl is not None and self.kl.place == "reward")

    def streaming(self, num_minibatches: int = 1, num_epochs: int = 1) -> tuple[Streaming, str]:
        """-> (how an update is accumulated, why)."""
        found, reason = streaming(
            "grpo" if self.has_own_advantage else self.advantage,
            has_terms_without_advantage=self.has_terms_without_advantage,
            has_m2po=self.m2po is not None,
            num_minibatches=num_minibatches,
            num_epochs=num_epochs,
        )
        if found is not Streaming.WAITS and self.estimates_in_trainer:
            return Streaming.WAITS, "a KL in the reward changes every advantage of the group"
        return found, reason

    def _check_parts(self) -> None:
        _check_part("algorithm.advantage", self.advantage, list(ADVANTAGES))
        _check_part("algorithm.loss", self.loss, list(LOSSES))
        if not self.has_own_advantage:
            allowed = ADVANTAGES[self.advantage].settings
            _check_settings("algorithm.advantage_settings", self.advantage_settings, allowed, self.advantage)
        if self.advantage == "gdpo":
            self._check_several_scores()
        if not self.has_own_loss:
            _check_settings("algorithm.loss_settings", self.loss_settings, LOSSES[self.loss].settings, self.loss)
        try:
            check_aggregation("ppo" if self.has_own_loss else self.loss, self.aggregate)
        except ValueError as error:
            raise ValueError(f"algorithm.aggregate: {error}") from error

    def _check_several_scores(self) -> None:
        name, weights = "algorithm.advantage_settings.weights", self.advantage_settings.get("weights")
        if not isinstance(weights, dict) or not weights:
            raise ValueError(
                f"{name}: {weights!r}; gdpo needs the names of the reward's scores and what each weighs, "
                "such as {score: 1.0, acc: 0.5}"
            )
        for score, weight in weights.items():
            check_positive(f"{name}.{score}", weight)
        for field_name, is_set in (
            ("kl.place", self.kl is not None and self.kl.place == "reward"),
            ("overlong_buffer", self.overlong_buffer > 0),
        ):
            if is_set:
                raise ValueError(
                    f"algorithm.{field_name}: comes off the reward, and gdpo normalises several scores each by itself; "
                    "make it one of the reward's scores, or place the KL in the loss"
                )

    def _check_clips(self) -> None:
        for name in ("clip_low", "clip_high"):
            if getattr(self, name) is not None:
                check_positive(f"algorithm.{name}", getattr(self, name))
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"algorithm.dual_clip: {self.dual_clip}; must be above 1, or null")
        if self.has_own_loss:
            return
        for argument, name in CLIPS.items():
            if argument not in LOSSES[self.loss].clips and getattr(self, name) is not None:
                raise ValueError(f"algorithm.{name}: {getattr(self, name)}; {self.loss} has no such clip, must be null")

    def _check_corrections(self) -> None:
        check_one_of("algorithm.old", self.old, list(ANCHORS))
        for name in ("opsm", "m2po"):
            if getattr(self, name) is not None:
                check_positive(f"algorithm.{name}", getattr(self, name))
        try:
            has_correction = self.correction is not None and not self.has_weight_in_loss
            check_policies("ppo" if self.has_own_loss else self.loss, ANCHORS[self.old], has_correction)
        except ValueError as error:
            raise ValueError(f"algorithm: {error}") from error
        if self.m2po is not None and self.old != "recomputed":
            raise ValueError(
                f"algorithm.m2po: {self.m2po}; it compares the rollout's log-probs with the trainer's, set "
                "algorithm.old=recomputed"
            )
        given = self.correction
        if self.loss == "segment_ppo" and given is not None and (given.mode, given.level) != ("mask", "token"):
            raise ValueError(
                f"algorithm.correction: mode {given.mode!r}, level {given.level!r}; segment_ppo masks its weight token "
                "by token and knows no other"
            )


def _check_part(name: str, value: str, known: list[str]) -> None:
    if ":" in value:
        check_dotted(name, value)
    else:
        check_one_of(name, value, known)


def _check_settings(name: str, given: dict[str, Any], allowed: tuple[str, ...], of: str) -> None:
    for key in given:
        if key not in allowed:
            takes = f"takes {', '.join(allowed)}" if allowed else "takes none"
            raise ValueError(f"{name}.{key}: {given[key]!r}; {of} {takes}")


@dataclass(frozen=True, kw_only=True)
class StalenessConfig:
    """max: no token is consumed that is older by more updates; 0 is synchronous. late: what happens when unready rows
    that are due hold ready ones up: `wait` for them, `drop` them and sample their prompts anew, or a function of yours,
    `package.module:function`, that says which of them to drop (see `transfer_queue.policies.LatePolicy`)."""

    max: int = 2
    late: str = "wait"

    def __post_init__(self) -> None:
        check_at_least("staleness.max", self.max, 0)
        try:
            late_policy(self.late)
        except ValueError as error:
            raise ValueError(f"staleness.{error}") from error
