"""Whatever dtype comes in, by position or by name: float32 maths, ids that are any integers, masks of any dtype."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.algorithms import advantages, corrections, kl, losses

SCORE_B = torch.tensor([1, 0, 0, 1, 2, 5])
GROUP_B = torch.tensor([10**12, -3, 10**12, -3, 7, -3])
MASK_BT = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]])
LENGTH_B = torch.tensor([4, 2, 2, 1, 1, 3])
TABLE_BT = SCORE_B[:, None] - torch.arange(4)
LOGPROB_BT = -TABLE_BT.abs()
POLICIES = (LOGPROB_BT, LOGPROB_BT.flip(1), TABLE_BT, MASK_BT)

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = {
    "gae": (advantages.gae, (TABLE_BT, LOGPROB_BT, MASK_BT, 1, 0.5), {}),
    "whiten": (advantages.whiten, (TABLE_BT, MASK_BT, False), {}),
    "grpo": (advantages.grpo, (SCORE_B, GROUP_B, 1e-6, False), {}),
    "rloo": (advantages.rloo, (SCORE_B, GROUP_B), {}),
    "reinforce_plus_plus": (advantages.reinforce_plus_plus, (TABLE_BT, MASK_BT, 0.9), {}),
    "reinforce_plus_plus_baseline": (advantages.reinforce_plus_plus_baseline, (SCORE_B, GROUP_B, MASK_BT), {}),
    "lite_ppo": (advantages.lite_ppo, (SCORE_B, GROUP_B, 1e-6), {}),
    "remax": (advantages.remax, (SCORE_B, SCORE_B.flip(0)), {}),
    "opo": (advantages.opo, (SCORE_B, LENGTH_B, GROUP_B), {}),
    "gdpo": (advantages.gdpo, (torch.stack([SCORE_B, SCORE_B.flip(0)]), GROUP_B, torch.tensor([1, 2])), {}),
    "grpo_passk": (advantages.grpo_passk, (SCORE_B, GROUP_B.abs().clamp(max=5) // 5), {}),
    **{name: (getattr(losses, name), POLICIES, {}) for name in ("ppo", "dapo", "gspo", "cispo", "topr", "dppo_tv")},
    **{name: (getattr(losses, name), POLICIES, {}) for name in ("sapo", "geo_mean")},
    "decoupled_ppo": (
        losses.decoupled_ppo,
        POLICIES,
        {"behave_logprob_BT": LOGPROB_BT, "proximal_logprob_BT": LOGPROB_BT},
    ),
    "segment_ppo": (
        losses.segment_ppo,
        POLICIES,
        {"behave_logprob_BT": LOGPROB_BT, "segment_proximal_logprob_BT": LOGPROB_BT},
    ),
    "aggregate": (losses.aggregate, (TABLE_BT, MASK_BT, "seq-mean-token-sum-norm", 3, 4), {}),
    "importance_weights": (
        corrections.importance_weights,
        (LOGPROB_BT, LOGPROB_BT.flip(1), MASK_BT, "sequence", "clip", 0.5, 2),
        {},
    ),
    "opsm": (corrections.opsm, POLICIES, {}),
    "m2po": (corrections.m2po, (LOGPROB_BT, LOGPROB_BT.flip(1), MASK_BT, 0.04), {}),
    "loglinear_proximal": (corrections.loglinear_proximal, (LOGPROB_BT, TABLE_BT, LOGPROB_BT + 3, 4), {}),
    **{name: (getattr(kl, name), (SCORE_B, SCORE_B.flip(0)), {}) for name in ("k1", "k2", "k3", "k3_plus")},
}
INTEGERS = ("group_B", "version_BT")


def results(found: Any) -> list[Tensor]:
    parts = found if isinstance(found, tuple) else (found,)
    return [tensor for part in parts for tensor in (part.values() if isinstance(part, dict) else (part,))]


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", sorted(CALLS))
def test_every_function_computes_in_float32_by_position_and_by_name(name: str, dtype: torch.dtype) -> None:
    """All numbers here are whole and small, so that every dtype holds them exactly."""
    function, given, more = CALLS[name]
    names = list(inspect.signature(function).parameters)
    exact = results(function(*(_as(torch.float32, *pair) for pair in zip(names, given, strict=False)), **more))
    named = {key: _as(dtype, key, value) for key, value in {**dict(zip(names, given, strict=False)), **more}.items()}
    for expected, actual in zip(exact, results(function(**named)), strict=True):
        assert actual.dtype == torch.float32
        assert torch.equal(actual, expected)


def _as(dtype: torch.dtype, name: str, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and name not in INTEGERS else value


@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float64])
def test_a_mask_may_be_of_any_dtype(kind: torch.dtype) -> None:
    for name in ("gae", "whiten", "ppo", "gspo", "topr", "aggregate", "importance_weights", "m2po"):
        function, given, _ = CALLS[name]
        masked = [value.to(kind) if value is MASK_BT else value for value in given]
        for expected, actual in zip(results(function(*given)), results(function(*masked)), strict=True):
            assert torch.equal(actual, expected)


def test_a_batch_of_nothing_is_legal() -> None:
    none_B, none_BT = torch.zeros(0), torch.zeros(0, 3)
    assert advantages.grpo(none_B, none_B.long()).shape == advantages.lite_ppo(none_B, none_B.long()).shape == (0,)
    assert advantages.whiten(none_BT, none_BT).shape == (0, 3)
    assert advantages.gae(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))[0].shape == (2, 0)
    assert losses.aggregate(losses.ppo(none_BT, none_BT, none_BT, none_BT).loss_BT, none_BT) == 0
    assert corrections.importance_weights(none_BT, none_BT, none_BT).weight_BT.shape == (0, 3)
