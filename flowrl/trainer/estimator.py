"""A sample's advantage, as a recipe composes it: the shaped score, the estimator. Formulas: `flowrl/algorithms/`.

Used by the advantage stage, and by the trainer where advantages need what only the trainer has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from controllers.dotted import load_attribute
from flowrl.algorithms import advantages, registry
from flowrl.algorithms.declarations import ADVANTAGES
from flowrl.algorithms.shaping import overlong_penalty
from flowrl.config.algorithm import AlgorithmConfig


class Estimator:
    """Scores of whole groups -> one advantage a sample. What spans the batch comes after it: the whitening of
    `reinforce_plus_plus_baseline` and `gdpo`, the deviation that Lite PPO divides by."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self._settings = {} if algorithm.score_weights else algorithm.advantage_settings
        self._function, self._inputs = _function(algorithm)

    def __call__(self, score_B: Tensor, group_B: Tensor, **more_B: Tensor) -> Tensor:
        """more_B: `length_B` (trained tokens), `baseline_B`, `scores_KB`, each of which only some estimators need.

        Raises ValueError if a function of the user's gives something else than a finite number a sample.
        """
        given = {"score_B": score_B, "group_B": group_B, **more_B}
        found = self._function(*(given[name] for name in self._inputs), **self._settings)
        advantage_B = torch.as_tensor(found, dtype=torch.float32)
        if advantage_B.shape != score_B.shape or not bool(advantage_B.isfinite().all()):
            raise ValueError(
                f"algorithm.advantage: gave shape {tuple(advantage_B.shape)} for {len(score_B)} samples; must give one "
                "finite number each"
            )
        return advantage_B


def _function(algorithm: AlgorithmConfig) -> tuple[Callable[..., Any], tuple[str, ...]]:
    if algorithm.has_own_advantage:
        return load_attribute(algorithm.advantage), ("score_B", "group_B")
    if algorithm.advantage == "lite_ppo":
        return lambda score_B, group_B, **_: advantages.centred(score_B, group_B), ("score_B", "group_B")
    if algorithm.advantage == "reinforce_plus_plus_baseline":
        return functools.partial(advantages.grpo, divide_by_std=False), ("score_B", "group_B")
    if algorithm.advantage == "gdpo":
        weight_K = torch.tensor(list(algorithm.score_weights.values()))
        return functools.partial(advantages.weighted_grpo, weight_K=weight_K), ("scores_KB", "group_B")
    return registry.ADVANTAGES[algorithm.advantage], ADVANTAGES[algorithm.advantage].inputs


def per_group(numbers: Sequence[np.ndarray], group_B: Tensor) -> Tensor:
    """What one row of each group has, and the others leave empty, on all rows of the group, (B,).

    Raises ValueError for a group in which no row has it."""
    of_group = {group: float(number[0]) for group, number in zip(group_B.tolist(), numbers, strict=True) if len(number)}
    missing = set(group_B.tolist()) - set(of_group)
    if missing:
        raise ValueError(f"baseline: group {min(missing)} came without one; its first row must have it")
    return torch.tensor([of_group[group] for group in group_B.tolist()])


def shaped_scores(reward_B: Tensor, length_B: Tensor, algorithm: AlgorithmConfig, max_tokens: int) -> Tensor:
    """The reward, less what an overlong response costs. length_B: trained tokens. max_tokens: the most there may be."""
    if not algorithm.overlong_buffer:
        return reward_B
    return reward_B + overlong_penalty(length_B, max_tokens, algorithm.overlong_buffer)
