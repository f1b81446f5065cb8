"""A sample's advantage, as a recipe composes it: the shaped score, the estimator. Formulas: `flowrl/algorithms/`.

Used by the advantage stage, and by the trainer where advantages need what only the trainer has.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from controllers.dotted import load_attribute
from flowrl.algorithms import advantages, registry
from flowrl.algorithms.declarations import ADVANTAGES
from flowrl.algorithms.shaping import overlong_penalty
from flowrl.config.algorithm import AlgorithmConfig


class Estimator:
    """Scores of whole groups -> one advantage a sample. What spans the batch comes after it: the whitening of
    `reinforce_plus_plus_baseline`, the deviation that Lite PPO divides by."""

    def __init__(self, algorithm: AlgorithmConfig) -> None:
        self._settings = algorithm.advantage_settings
        self._function, self._inputs = _function(algorithm)

    def __call__(self, score_B: Tensor, group_B: Tensor, **more_B: Tensor) -> Tensor:
        """more_B: `length_B` (trained tokens), which only some estimators need.

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
    return registry.ADVANTAGES[algorithm.advantage], ADVANTAGES[algorithm.advantage].inputs


def shaped_scores(reward_B: Tensor, length_B: Tensor, algorithm: AlgorithmConfig, max_tokens: int) -> Tensor:
    """The reward, less what an overlong response costs. length_B: trained tokens. max_tokens: the most there may be."""
    if not algorithm.overlong_buffer:
        return reward_B
    return reward_B + overlong_penalty(length_B, max_tokens, algorithm.overlong_buffer)
