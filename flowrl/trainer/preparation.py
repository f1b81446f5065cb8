"""What a whole batch needs before the first of its steps: old and reference log-probs, values, advantages, masks.

On every rank, with this rank's rows; what depends on the rows of all ranks (whitening, m2po) is computed over them all.
The rows of a group are on one rank, as the queue hands them out.

Shapes: B rows of this rank, T trained tokens of the longest row, flush left; N trained tokens of all rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from flowrl.algorithms import advantages, corrections, kl
from flowrl.config.algorithm import AlgorithmConfig
from flowrl.trainer.estimator import Estimator, per_group, shaped_scores
from flowrl.trainer.gathering import gather_values, global_moments, global_whiten
from flowrl.trainer.packing import Sample

Scoring = Callable[[Sequence[Sample]], list[np.ndarray]]
LITE_PPO_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """samples: with what was computed, in `per_token` or `advantage`. returns, values: of the critic, one number a
    response token; empty without one. measured: by the name of the metric, of this rank's trained tokens or rows."""

    samples: list[Sample]
    returns: list[np.ndarray] = field(default_factory=list)
    values: list[np.ndarray] = field(default_factory=list)
    measured: dict[str, Tensor] = field(default_factory=dict)


class Preparation:
    """old, reference, values: what scores responses under those models; None where the recipe has no use for one."""

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        *,
        max_response_tokens: int,
        old: Scoring | None,
        reference: Scoring | None,
        values: Scoring | None,
    ) -> None:
        self._algorithm = algorithm
        self._max_response_tokens = max_response_tokens
        self._old = old
        self._reference = reference
        self._values = values
        self._estimator = None if algorithm.advantage in ("gae", "reinforce_plus_plus") else Estimator(algorithm)

    def prepare(self, samples: Sequence[Sample], kl_coef: float) -> Prepared:
        """On every rank."""
        found = list(samples)
        for name, scoring in (("old", self._old), ("reference", self._reference)):
            if scoring is not None:
                found = _with(found, name, scoring(found))
        if self._algorithm.m2po is not None:
            found = self._without_far_tokens(found, self._algorithm.m2po)
        if self._algorithm.estimates_in_trainer:
            return self._with_advantages(found, kl_coef)
        if self._algorithm.advantage == "lite_ppo":
            score_B = scores(found, self._algorithm, self._max_response_tokens)
            divisor = self._lite_ppo_divisor(score_B)
            found = [replace(sample, advantage=sample.advantage / divisor) for sample in found]
        return Prepared(samples=found)

    def _without_far_tokens(self, samples: list[Sample], tau: float) -> list[Sample]:
        behave_N = _trained(samples, [sample.rollout_logprobs for sample in samples])
        old_N = _trained(samples, [sample.per_token["old"] for sample in samples])
        everywhere, start = gather_values(torch.stack([behave_N, old_N]))
        keep_N = corrections.m2po(everywhere[:1], everywhere[1:], torch.ones_like(everywhere[:1]), tau)[0]
        return _with(samples, "keep", _on_responses(samples, keep_N[start : start + len(old_N)]))

    def _with_advantages(self, samples: list[Sample], kl_coef: float) -> Prepared:
        mask_BT = _mask(samples)
        is_on_BT = mask_BT > 0
        reward_BT, measured = self._token_rewards(samples, mask_BT, kl_coef)
        measured["critic/rewards"] = reward_BT.sum(dim=1)
        values = [] if self._values is None else self._values(samples)
        returns: list[np.ndarray] = []
        if values:
            value_BT = _table(samples, values, mask_BT)
            adv_BT, return_BT = advantages.gae(reward_BT, value_BT, mask_BT, **self._algorithm.advantage_settings)
            adv_BT = global_whiten(adv_BT, mask_BT)
            returns = _on_responses(samples, return_BT[is_on_BT])
            measured |= {"critic/returns": return_BT[is_on_BT], "critic/values": value_BT[is_on_BT]}
        elif self._estimator is None:
            gamma = self._algorithm.advantage_settings.get("gamma", 1.0)
            return_BT, _ = advantages.gae(reward_BT, torch.zeros_like(reward_BT), mask_BT, gamma=gamma, lam=1.0)
            adv_BT = global_whiten(return_BT, mask_BT)
        else:
            adv_BT = self._of_samples(self._estimator, samples, reward_BT.sum(dim=1), mask_BT)
        measured["critic/advantages"] = adv_BT[is_on_BT]
        samples = _with(samples, "advantage", _on_responses(samples, adv_BT[is_on_BT]))
        return Prepared(samples=samples, returns=returns, values=values, measured=measured)

    def _of_samples(self, estimator: Estimator, samples: list[Sample], score_B: Tensor, mask_BT: Tensor) -> Tensor:
        """An estimator of samples, and what it leaves to the batch."""
        group_B = torch.tensor([sample.key.group for sample in samples], dtype=torch.int64)
        more_B = {"length_B": mask_BT.sum(dim=1), **self._row_numbers(samples, group_B)}
        adv_B = estimator(score_B, group_B, **more_B)
        if self._algorithm.advantage == "gdpo":
            adv_B = global_whiten(adv_B[None], torch.ones_like(adv_B)[None])[0]
        adv_BT = advantages.spread(adv_B, mask_BT)
        if self._algorithm.advantage == "reinforce_plus_plus_baseline":
            return global_whiten(adv_BT, mask_BT)
        if self._algorithm.advantage == "lite_ppo":
            return adv_BT / self._lite_ppo_divisor(score_B)
        return adv_BT

    def _row_numbers(self, samples: list[Sample], group_B: Tensor) -> dict[str, Tensor]:
        """What the estimator needs beside rewards and lengths."""
        if self._algorithm.has_greedy_baseline:
            return {"baseline_B": per_group([sample.per_row["baseline"] for sample in samples], group_B)}
        num_scores = len(self._algorithm.score_weights)
        if not num_scores:
            return {}
        scores_BK = np.array([sample.per_row["scores"] for sample in samples], np.float32)
        return {"scores_KB": torch.from_numpy(scores_BK.reshape(len(samples), num_scores).T)}

    def _lite_ppo_divisor(self, score_B: Tensor) -> float:
        _, variance = global_moments(score_B)
        return variance**0.5 + float(self._algorithm.advantage_settings.get("eps", LITE_PPO_EPS))

    def _token_rewards(
        self, samples: list[Sample], mask_BT: Tensor, kl_coef: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The score on the last trained token; a KL in the reward on every one."""
        score_B = scores(samples, self._algorithm, self._max_response_tokens)
        last_B1 = (mask_BT.sum(dim=1, keepdim=True).long() - 1).clamp(min=0)
        reward_BT = torch.zeros_like(mask_BT).scatter(1, last_B1, score_B[:, None]) * mask_BT
        given = self._algorithm.kl
        if given is None or given.place != "reward":
            return reward_BT, {}
        anchors = [sample.per_token.get("old", sample.rollout_logprobs) for sample in samples]
        logprob_BT = _table(samples, anchors, mask_BT)
        reference_BT = _table(samples, [sample.per_token["reference"] for sample in samples], mask_BT)
        kl_BT = kl.ESTIMATORS[given.estimator](logprob_BT, reference_BT)
        return kl.penalised_reward(reward_BT, kl_BT, mask_BT, kl_coef), {"actor/reward_kl": kl_BT[mask_BT > 0]}


def scores(samples: Sequence[Sample], algorithm: AlgorithmConfig, max_response_tokens: int) -> Tensor:
    """Shaped, (B,)."""
    reward_B = torch.tensor([sample.reward for sample in samples], dtype=torch.float32)
    length_B = torch.tensor([sample.num_trained_tokens for sample in samples])
    return shaped_scores(reward_B, length_B, algorithm, max_response_tokens)


def _with(samples: Sequence[Sample], name: str, rows: Sequence[np.ndarray]) -> list[Sample]:
    return [
        replace(sample, per_token={**sample.per_token, name: row}) for sample, row in zip(samples, rows, strict=True)
    ]


def _trained(samples: Sequence[Sample], rows: Sequence[np.ndarray]) -> Tensor:
    """Rows of response tokens -> x_N."""
    parts = [row[sample.response_mask > 0] for sample, row in zip(samples, rows, strict=True)]
    return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *parts]).astype(np.float32))


def _on_responses(samples: Sequence[Sample], x_N: Tensor) -> list[np.ndarray]:
    """x_N -> rows of response tokens, 0 where the model did not write."""
    ends = np.cumsum([sample.num_trained_tokens for sample in samples], dtype=np.int64)
    rows = []
    for sample, part in zip(samples, np.split(x_N.numpy(), ends[:-1]) if samples else [], strict=True):
        row = np.zeros(len(sample.response_tokens), np.float32)
        row[sample.response_mask > 0] = part
        rows.append(row)
    return rows


def _mask(samples: Sequence[Sample]) -> Tensor:
    """mask_BT, at least one column wide."""
    length_B = torch.tensor([sample.num_trained_tokens for sample in samples], dtype=torch.int64)
    longest = max([1, *length_B.tolist()])
    return (torch.arange(longest)[None] < length_B[:, None]).float()


def _table(samples: Sequence[Sample], rows: Sequence[np.ndarray], mask_BT: Tensor) -> Tensor:
    """Rows of response tokens -> x_BT, 0 where masked."""
    return torch.zeros_like(mask_BT).masked_scatter(mask_BT > 0, _trained(samples, rows))
