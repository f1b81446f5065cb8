"""What each algorithm is, without its maths: inputs, anchor, aggregation, what streams. Imports without torch, so that
a recipe is checked at once; `registry` holds the functions under the same names.

Streaming: with one optimizer step a version, gradients accumulate unnormalised while the batch still arrives, and one
number divides them at the end. That is exact when neither a sample's advantage nor its mask depends on samples that
have not arrived, or does so only through a common positive factor.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

AGGREGATIONS = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
)


class Scope(enum.Enum):
    """What an advantage depends on. ROW: its sample. GROUP: its group. SCALE: its group, and one factor common to the
    batch. BATCH: the whole batch."""

    ROW = "row"
    GROUP = "group"
    SCALE = "scale"
    BATCH = "batch"


class Anchor(enum.Enum):
    """Which policy `old_logprob_BT` is. ROLLOUT: what sampled the token. RECOMPUTED: the trainer's policy before the
    update, by a forward pass or a stand-in for one."""

    ROLLOUT = "rollout"
    RECOMPUTED = "recomputed"


class Streaming(enum.Enum):
    """STREAMS: accumulate at once. SCALED: accumulate with undivided advantages, divide the gradient by the batch's
    factor at the end. WAITS: the whole batch must be there first."""

    STREAMS = "streams"
    SCALED = "scaled"
    WAITS = "waits"


@dataclass(frozen=True, kw_only=True)
class AdvantageTraits:
    """`inputs`: the positional arguments. `is_per_token`: gives (B, T), otherwise (B,). `settings`: what a recipe may
    set. `least_group`: samples of a prompt below which every advantage would be zero, or undefined."""

    scope: Scope
    inputs: tuple[str, ...]
    is_per_token: bool = False
    settings: tuple[str, ...] = ()
    least_group: int = 1


@dataclass(frozen=True, kw_only=True)
class LossTraits:
    """`aggregation`: the default; `is_forced`: no other is right. `has_own_weight`: multiplies by its own w. `clips`:
    which of lo, hi, c it has, with their defaults. `settings`: what else a recipe may set. Every loss here is
    positively homogeneous in A: loss(k·A) = k·loss(A) for k > 0."""

    aggregation: str = "token-mean"
    is_forced: bool = False
    anchors: tuple[Anchor, ...] = (Anchor.ROLLOUT, Anchor.RECOMPUTED)
    has_own_weight: bool = False
    clips: dict[str, float | None] = field(default_factory=lambda: {"lo": 0.2, "hi": 0.2, "c": 3.0})
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Algorithm:
    """A name people use: its parts, and the settings that differ from theirs. `correction`: for a loss with a weight of
    its own, the bounds of that weight. A recipe may replace each of them."""

    advantage: str
    loss: str
    aggregation: str = "token-mean"
    anchor: Anchor = Anchor.ROLLOUT
    advantage_settings: dict[str, Any] = field(default_factory=dict)
    loss_settings: dict[str, Any] = field(default_factory=dict)
    correction: dict[str, Any] | None = None


_SCORE_GROUP = ("score_B", "group_B")
_WHITENED: dict[str, Any] = {"scope": Scope.BATCH, "is_per_token": True}
ADVANTAGES = {
    "gae": AdvantageTraits(**_WHITENED, inputs=("reward_BT", "value_BT", "mask_BT"), settings=("gamma", "lam")),
    "grpo": AdvantageTraits(scope=Scope.GROUP, inputs=_SCORE_GROUP, settings=("eps", "divide_by_std")),
    "rloo": AdvantageTraits(scope=Scope.GROUP, inputs=_SCORE_GROUP, least_group=2),
    "reinforce_plus_plus": AdvantageTraits(**_WHITENED, inputs=("reward_BT", "mask_BT"), settings=("gamma",)),
    "reinforce_plus_plus_baseline": AdvantageTraits(**_WHITENED, inputs=(*_SCORE_GROUP, "mask_BT"), least_group=2),
    "lite_ppo": AdvantageTraits(scope=Scope.SCALE, inputs=_SCORE_GROUP, settings=("eps",), least_group=2),
    "remax": AdvantageTraits(scope=Scope.ROW, inputs=("score_B", "baseline_B")),
    "opo": AdvantageTraits(scope=Scope.GROUP, inputs=("score_B", "length_B", "group_B"), least_group=2),
    "gdpo": AdvantageTraits(
        scope=Scope.BATCH, inputs=("scores_KB", "group_B", "weight_K"), settings=("weights",), least_group=2
    ),
    "grpo_passk": AdvantageTraits(scope=Scope.GROUP, inputs=_SCORE_GROUP, least_group=2),
}

_SEQUENCE: dict[str, Any] = {"aggregation": "seq-mean-token-mean", "is_forced": True}
_OWN_WEIGHT: dict[str, Any] = {
    "anchors": (Anchor.RECOMPUTED,),
    "has_own_weight": True,
    "clips": {"lo": 0.2, "hi": 0.2, "c": None},
}
LOSSES = {
    "ppo": LossTraits(),
    "dapo": LossTraits(clips={"lo": 0.2, "hi": 0.28, "c": 3.0}),
    "gspo": LossTraits(**_SEQUENCE, clips={"lo": 3e-4, "hi": 4e-4}),
    "cispo": LossTraits(clips={"lo": 0.2, "hi": 0.28}),
    "topr": LossTraits(clips={}, settings=("level",)),
    "dppo_tv": LossTraits(anchors=(Anchor.ROLLOUT,), clips={"lo": 0.2, "hi": 0.2, "c": 20.0}),
    "sapo": LossTraits(**_SEQUENCE, clips={}, settings=("tau_pos", "tau_neg")),
    "geo_mean": LossTraits(**_SEQUENCE, clips={"lo": 0.4, "hi": 0.4}),
    "decoupled_ppo": LossTraits(**_OWN_WEIGHT),
    "segment_ppo": LossTraits(**_OWN_WEIGHT),
}

_NO_SPREAD = {"divide_by_std": False}
_W_TO_5 = {"mode": "mask", "level": "token", "low": 0.0, "high": 5.0}
_DECOUPLED: dict[str, Any] = {"anchor": Anchor.RECOMPUTED, "correction": _W_TO_5}
ALGORITHMS = {
    "grpo": Algorithm(advantage="grpo", loss="ppo", loss_settings={"hi": 0.28}),
    "dr_grpo": Algorithm(
        advantage="grpo",
        loss="ppo",
        aggregation="seq-mean-token-sum-norm",
        advantage_settings=_NO_SPREAD,
    ),
    "dapo": Algorithm(advantage="grpo", loss="dapo"),
    "gspo": Algorithm(advantage="grpo", loss="gspo", aggregation="seq-mean-token-mean"),
    "cispo": Algorithm(advantage="grpo", loss="cispo"),
    "topr": Algorithm(advantage="grpo", loss="topr", advantage_settings=_NO_SPREAD),
    "dppo_tv": Algorithm(advantage="grpo", loss="dppo_tv"),
    "sapo": Algorithm(advantage="grpo", loss="sapo", aggregation="seq-mean-token-mean"),
    "gmpo": Algorithm(advantage="grpo", loss="geo_mean", aggregation="seq-mean-token-mean"),
    "rloo": Algorithm(advantage="rloo", loss="ppo"),
    "opo": Algorithm(advantage="opo", loss="ppo"),
    "remax": Algorithm(advantage="remax", loss="ppo"),
    "gdpo": Algorithm(advantage="gdpo", loss="ppo"),
    "grpo_passk": Algorithm(advantage="grpo_passk", loss="ppo"),
    "lite_ppo": Algorithm(advantage="lite_ppo", loss="ppo", loss_settings={"c": None}),
    "reinforce_plus_plus": Algorithm(advantage="reinforce_plus_plus", loss="ppo"),
    "reinforce_plus_plus_baseline": Algorithm(advantage="reinforce_plus_plus_baseline", loss="ppo"),
    "ppo": Algorithm(advantage="gae", loss="ppo"),
    "decoupled_ppo": Algorithm(advantage="grpo", loss="decoupled_ppo", **_DECOUPLED),
    "segment_ppo": Algorithm(advantage="grpo", loss="segment_ppo", **_DECOUPLED),
}


def streaming(
    advantage: str,
    *,
    has_terms_without_advantage: bool = False,
    has_m2po: bool = False,
    num_minibatches: int = 1,
    num_epochs: int = 1,
) -> tuple[Streaming, str]:
    """-> (what it does, why). `has_terms_without_advantage`: a KL, entropy or auxiliary loss beside the policy loss."""
    traits = ADVANTAGES[_known("advantage", advantage, ADVANTAGES)]
    if num_minibatches > 1 or num_epochs > 1:
        return Streaming.WAITS, "several minibatches or epochs: the first step would move the anchor of the rest"
    if has_m2po:
        return Streaming.WAITS, "m2po chooses tokens from the whole batch"
    if traits.scope is Scope.BATCH:
        return Streaming.WAITS, f"{advantage} whitens over the whole batch"
    if traits.scope is Scope.SCALE and has_terms_without_advantage:
        return Streaming.WAITS, f"{advantage} divides by the batch's deviation; a term without A must not be divided"
    if traits.scope is Scope.SCALE:
        return Streaming.SCALED, f"{advantage} divides by the batch's deviation, which comes out of the gradient"
    return Streaming.STREAMS, f"{advantage} depends on no more than its {traits.scope.value}"


def check_policies(loss: str, anchor: Anchor, has_correction: bool) -> None:
    """Raises ValueError, with the reason, for log-probs and corrections that do not belong together."""
    traits = LOSSES[_known("loss", loss, LOSSES)]
    if anchor not in traits.anchors:
        reason = "its w compares them with the rollout's" if traits.has_own_weight else "it compares with the sampler"
        raise ValueError(f"old log-probs: {anchor.value}; {loss} needs {traits.anchors[0].value} ones: {reason}")
    if has_correction and traits.has_own_weight:
        raise ValueError(f"correction: {loss} already weighs by proximal/behave; another weight would count it twice")
    if has_correction and anchor is Anchor.ROLLOUT:
        raise ValueError(
            "correction: old log-probs are the rollout's: the ratio already corrects, a weight would count twice"
        )


def check_aggregation(loss: str, mode: str) -> None:
    """Raises ValueError for an aggregation that does not exist or that the loss does not allow."""
    traits = LOSSES[_known("loss", loss, LOSSES)]
    _known("aggregation", mode, AGGREGATIONS)
    if traits.is_forced and mode != traits.aggregation:
        raise ValueError(f"aggregation: {mode!r}; {loss} is defined per sequence and needs {traits.aggregation!r}")


def _known(what: str, name: str, names: Any) -> str:
    if name not in names:
        raise ValueError(f"{what}: {name!r}; must be one of {', '.join(names)}")
    return name
