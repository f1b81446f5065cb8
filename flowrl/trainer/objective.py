"""The loss of a micro-batch, as a recipe composes it: policy loss, corrections, terms beside it. The formulas are in
`flowrl/algorithms/`; what divides a sum over the batch is `update.py`'s.

Shapes: B rows, T trained tokens of the longest row, R trained tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from controllers.dotted import load_attribute
from flowrl.algorithms import registry
from flowrl.algorithms.aggregation import aggregate
from flowrl.algorithms.corrections import BOUNDS, importance_weights, loglinear_proximal, opsm
from flowrl.algorithms.declarations import LOSSES
from flowrl.algorithms.kl import ESTIMATORS, AdaptiveKL, FixedKL, k3, kl_loss
from flowrl.algorithms.losses import PolicyLoss
from flowrl.algorithms.masked import masked_mean
from flowrl.algorithms.shaping import entropy_bonus
from flowrl.config.algorithm import CLIPS, AlgorithmConfig, KLConfig
from flowrl.trainer.packing import MicroBatch


class Objective:
    """`columns`: what it wants of each sample's `per_token`. `kl_coef`: a controller whose `value` is in force."""

    def __init__(
        self, algorithm: AlgorithmConfig, *, max_response_tokens: int, has_old: bool, measures_drift: bool = False
    ) -> None:
        """has_old: the samples bring log-probs of the policy before the update; without them the current pass's own
        serve, which are the same as long as the update is one step. measures_drift: from the old policy, as k3."""
        self.algorithm = algorithm
        self.horizon = algorithm.horizon or max_response_tokens
        self.kl_coef = kl_controller(algorithm.kl)
        self._loss = load_loss(algorithm)
        self._settings = _settings(algorithm)
        self._has_kl = algorithm.kl is not None and algorithm.kl.place == "loss"
        self._measures_drift = measures_drift
        self._is_segment = algorithm.loss == "segment_ppo"
        wanted = {
            "old": has_old,
            "version": self._is_segment or algorithm.old == "loglinear",
            "segment": self._is_segment,
            "reference": self._has_kl,
            "keep": algorithm.m2po is not None,
        }
        self.columns = tuple(name for name, is_wanted in wanted.items() if is_wanted)

    def token_losses(self, batch: MicroBatch, logprob_R: Tensor, entropy_R: Tensor, version: int) -> PolicyLoss:
        """A loss for each token, and metrics: means over the tokens. version: that of the policy before the update."""
        packed, algorithm = batch.packed, self.algorithm
        mask_BT = packed.mask_BT()
        logprob_BT = packed.table(logprob_R)
        behave_BT = packed.table(batch.rollout_logprob_R)
        old_BT = self._old_logprobs(batch, logprob_BT, behave_BT, version)
        policies = self._other_policies(batch, old_BT, behave_BT, version)
        found = self._loss(logprob_BT, old_BT, batch.advantage_BT, mask_BT, **self._settings, **policies)
        loss_BT, metrics = found if isinstance(found, PolicyLoss) else (found, {})
        if self._is_segment:
            is_absent_BT = policies["segment_proximal_logprob_BT"].isnan()
            metrics = metrics | {"actor/segment_absent": masked_mean(is_absent_BT, mask_BT > 0)}
        if algorithm.correction is not None and not algorithm.has_weight_in_loss:
            c = algorithm.correction
            corrected = importance_weights(old_BT, behave_BT, mask_BT, c.level, c.mode, c.low, c.high)
            loss_BT, metrics = loss_BT * corrected.weight_BT, metrics | corrected.metrics
        if algorithm.opsm is not None:
            advantage_BT = batch.advantage_BT.expand_as(mask_BT)
            keep_BT = opsm(logprob_BT.detach(), behave_BT, advantage_BT, mask_BT, algorithm.opsm)
            loss_BT = loss_BT * keep_BT
            metrics = metrics | {"actor/opsm_dropped": masked_mean(1 - keep_BT, mask_BT > 0)}
        if "keep" in batch.columns_R:
            loss_BT = loss_BT * packed.table(batch.columns_R["keep"])
        if self._has_kl:
            loss_BT, metrics = self._with_kl(batch, loss_BT, metrics, logprob_BT, mask_BT)
        if algorithm.entropy_coef:
            loss_BT = loss_BT + entropy_bonus(packed.table(entropy_R), mask_BT, algorithm.entropy_coef)
        if self._measures_drift:
            metrics = metrics | {"actor/k3_kl": masked_mean(k3(old_BT, logprob_BT.detach()), mask_BT > 0)}
        return PolicyLoss(loss_BT, metrics)

    def total(self, loss_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """The sum that the batch's denominator will divide."""
        return aggregate(loss_BT, mask_BT, self.algorithm.aggregate, denominator=1.0, horizon=self.horizon)

    def _old_logprobs(self, batch: MicroBatch, logprob_BT: Tensor, behave_BT: Tensor, version: int) -> Tensor:
        if self.algorithm.old == "rollout":
            return behave_BT
        if self.algorithm.old == "loglinear":
            version_BT = batch.packed.table(batch.columns_R["version"])
            return loglinear_proximal(behave_BT, logprob_BT.detach(), version_BT, version)
        return batch.packed.table(batch.columns_R["old"]) if "old" in batch.columns_R else logprob_BT.detach()

    def _other_policies(self, batch: MicroBatch, old_BT: Tensor, behave_BT: Tensor, version: int) -> dict[str, Tensor]:
        """The arguments of a loss that has a weight of its own."""
        if not self.algorithm.has_weight_in_loss:
            return {}
        if not self._is_segment:
            return {"behave_logprob_BT": behave_BT}
        # The version after that of a token one update old is the one before this update: its log-prob is at hand.
        version_BT = batch.packed.table(batch.columns_R["version"])
        segment_BT = batch.packed.table(batch.columns_R["segment"])
        segment_BT = torch.where(version_BT == version - 1, old_BT, segment_BT)
        segment_BT = torch.where(version_BT >= version, behave_BT, segment_BT)
        return {"behave_logprob_BT": behave_BT, "segment_proximal_logprob_BT": segment_BT}

    def _with_kl(
        self, batch: MicroBatch, loss_BT: Tensor, metrics: dict[str, Tensor], logprob_BT: Tensor, mask_BT: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        kl = self.algorithm.kl
        assert kl is not None
        reference_BT = batch.packed.table(batch.columns_R["reference"])
        loss_BT = loss_BT + kl_loss(logprob_BT, reference_BT, mask_BT, self.kl_coef.value, kl.estimator)
        distance_BT = ESTIMATORS[kl.estimator](logprob_BT.detach(), reference_BT)
        return loss_BT, metrics | {"actor/kl": masked_mean(distance_BT, mask_BT > 0)}


def kl_controller(kl: KLConfig | None) -> FixedKL | AdaptiveKL:
    if kl is None or kl.target is None:
        return FixedKL(0.0 if kl is None else kl.coef)
    return AdaptiveKL(kl.coef, kl.target, kl.horizon)


def load_loss(algorithm: AlgorithmConfig) -> Callable[..., PolicyLoss | Tensor]:
    """A loss of ours, or the user's: `f(logprob_BT, old_logprob_BT, advantage_BT, mask_BT, **settings)`, which returns
    a loss for each token, with metrics (`PolicyLoss`) or without."""
    return load_attribute(algorithm.loss) if algorithm.has_own_loss else registry.LOSSES[algorithm.loss]


def _settings(algorithm: AlgorithmConfig) -> dict[str, Any]:
    """The keyword arguments that do not depend on the batch."""
    if algorithm.has_own_loss:
        given = {argument: getattr(algorithm, field) for argument, field in CLIPS.items()}
        return {name: value for name, value in given.items() if value is not None} | algorithm.loss_settings
    found = {argument: getattr(algorithm, CLIPS[argument]) for argument in LOSSES[algorithm.loss].clips}
    return found | algorithm.loss_settings | _weight_settings(algorithm)


def _weight_settings(algorithm: AlgorithmConfig) -> dict[str, Any]:
    """Without a correction the weight stays, unbounded."""
    if not algorithm.has_weight_in_loss:
        return {}
    given = algorithm.correction
    mode, level = ("none", "token") if given is None else (given.mode, given.level)
    low, high = BOUNDS[mode]
    if given is not None:
        low, high = (low if given.low is None else given.low), (high if given.high is None else given.high)
    bounds = {"floor": low, "cap": high}
    return bounds if algorithm.loss == "segment_ppo" else {"correction": mode, "level": level} | bounds
