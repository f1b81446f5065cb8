"""What to do about tokens that another policy sampled. Owns importance weights and masks; knows no loss.

Multiply `loss_BT` by what comes out of here. Never put it into `mask_BT`: denominators are fixed before a correction.
Nothing here carries a gradient, and a correction that leaves no token is legal.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.algorithms.masked import (
    MAX_LOGRATIO,
    bounded_exp,
    check_shapes,
    masked_mean,
    only,
    sequence_mean,
    sequence_sum,
)

LEVELS = ("token", "sequence", "geometric")
# The bounds a mode has when none are given: truncation (TIS) looks up only, masking (IcePop, MIS) both ways.
BOUNDS = {"truncate": (0.0, 2.0), "clip": (0.5, 5.0), "mask": (0.5, 5.0), "none": (0.0, float("inf"))}


class Weights(NamedTuple):
    """weight_BT: 0 where masked. metrics: detached scalars named `rollout_corr/…`, finite."""

    weight_BT: Tensor
    metrics: dict[str, Tensor]


@torch.no_grad()
def importance_weights(
    train_logprob_BT: Tensor,
    rollout_logprob_BT: Tensor,
    mask_BT: Tensor,
    level: str = "token",
    mode: str = "truncate",
    low: float | None = None,
    high: float | None = None,
) -> Weights:
    """w = exp(train - rollout), bounded. -> (weight_BT, metrics)

    level: "token"; "sequence", exp of the masked sum; "geometric", exp of the masked mean: one weight for all of a row.
    mode: "truncate", min(w, high) (TIS, Yao et al. 2025); "clip" to [low, high]; "mask", w inside [low, high] and 0
    outside (IcePop, MIS); "none", w. Bounds left out are those of `BOUNDS`.
    """
    check_shapes(mask_BT, train_logprob_BT=train_logprob_BT, rollout_logprob_BT=rollout_logprob_BT)
    least, most = _bounds(mode, low, high)
    is_on_BT = mask_BT > 0
    logratio_BT = only(train_logprob_BT, is_on_BT) - only(rollout_logprob_BT, is_on_BT)
    ratio_BT = bounded_exp(_at_level(logratio_BT, is_on_BT, level))
    if mode == "truncate":
        weight_BT = ratio_BT.clamp(max=most)
    elif mode == "clip":
        weight_BT = ratio_BT.clamp(least, most)
    else:
        weight_BT = ratio_BT.masked_fill((ratio_BT < least) | (ratio_BT > most), 0.0)
    weight_BT = only(weight_BT, is_on_BT)
    return Weights(weight_BT, _metrics(logratio_BT, weight_BT, is_on_BT))


@torch.no_grad()
def opsm(
    logprob_BT: Tensor, old_logprob_BT: Tensor, advantage_BT: Tensor, mask_BT: Tensor, delta: float = 1e-4
) -> Tensor:
    """-> keep_BT, 1.0 on tokens kept. Drops a row whose A is negative and whose mean(old - logprob) exceeds delta.

    The off-policy sequence mask of DeepSeek-V3.2. A is the row's masked mean.
    """
    check_shapes(mask_BT, logprob_BT=logprob_BT, old_logprob_BT=old_logprob_BT, advantage_BT=advantage_BT)
    is_on_BT = mask_BT > 0
    drift_B1 = sequence_mean(only(old_logprob_BT, is_on_BT) - only(logprob_BT, is_on_BT), is_on_BT)
    is_dropped_B1 = (sequence_mean(advantage_BT, is_on_BT) < 0) & (drift_B1 > delta)
    return (is_on_BT & ~is_dropped_B1).float()


@torch.no_grad()
def m2po(behave_BT: Tensor, proximal_BT: Tensor, mask_BT: Tensor, tau: float = 0.04) -> Tensor:
    """-> keep_BT, 1.0 on tokens kept. Drops the tokens with the largest (behave - proximal)² until the mean of the rest
    is below tau; all of them, if need be.

    AReaL's variant of M2PO (Zheng et al. 2025); the authors' own clips current/behave where the advantage pushes the
    ratio further out. Over the global batch, never per micro-batch: which tokens go depends on all of them.
    """
    check_shapes(mask_BT, behave_BT=behave_BT, proximal_BT=proximal_BT)
    is_on_BT = mask_BT > 0
    moment_BT = (only(behave_BT, is_on_BT) - only(proximal_BT, is_on_BT)).square()
    ascending_N, order_N = moment_BT[is_on_BT].sort(stable=True)
    # The mean of the smallest n grows with n, so the tokens that stay are a prefix. float64: millions of terms.
    mean_N = ascending_N.cumsum(0, dtype=torch.float64) / torch.arange(1, len(ascending_N) + 1, device=mask_BT.device)
    keep_N = torch.zeros_like(ascending_N)
    keep_N[order_N] = (mean_N < tau).float()
    return torch.zeros_like(moment_BT).masked_scatter(is_on_BT, keep_N)


@torch.no_grad()
def loglinear_proximal(behave: Tensor, current: Tensor, version_BT: Tensor, current_version: int) -> Tensor:
    """The proximal log-prob without recomputing it: behave + α(current - behave), on the line between the two versions.

    α = clamp((v-1-v_b)/(v-v_b), 0, 1) with v the current version and v_b the token's; 0 where v_b < 0 or v_b ≥ v.
    """
    check_shapes(behave, current=current, version_BT=version_BT)
    lag_BT = (current_version - version_BT).float()
    has_lag_BT = (version_BT >= 0) & (lag_BT > 0)
    alpha_BT = torch.where(has_lag_BT, ((lag_BT - 1) / lag_BT.clamp(min=1)).clamp(0, 1), 0.0)
    return behave.float() + alpha_BT * (current.float() - behave.float())


def _bounds(mode: str, low: float | None, high: float | None) -> tuple[float, float]:
    if mode not in BOUNDS:
        raise ValueError(f"mode: {mode!r}; must be one of {', '.join(BOUNDS)}")
    if mode == "none":
        return BOUNDS["none"]
    least = BOUNDS[mode][0] if low is None else low
    most = BOUNDS[mode][1] if high is None else high
    if mode == "truncate":
        least = 0.0
    if not 0 <= least <= most:
        raise ValueError(f"low: {least}, high: {most}; bounds of a weight must read 0 <= low <= high")
    return least, most


def _at_level(logratio_BT: Tensor, is_on_BT: Tensor, level: str) -> Tensor:
    if level not in LEVELS:
        raise ValueError(f"level: {level!r}; must be one of {', '.join(LEVELS)}")
    if level == "token":
        return logratio_BT
    whole_B1 = (sequence_sum if level == "sequence" else sequence_mean)(logratio_BT, is_on_BT)
    return whole_B1.expand_as(logratio_BT)


def _metrics(logratio_BT: Tensor, weight_BT: Tensor, is_on_BT: Tensor) -> dict[str, Tensor]:
    """kl: KL(rollout ‖ train), k1 and k3 estimates; chi2_token: mean squared ratio minus 1; ess: effective sample size
    of the weights used, as a fraction of the tokens; masked_fraction: tokens whose weight is 0."""
    bounded_BT = logratio_BT.clamp(-MAX_LOGRATIO, MAX_LOGRATIO)
    num_tokens = is_on_BT.sum()
    # Σw and Σw² relative to the largest weight: a weight may be as large as exp(20).
    largest = weight_BT.amax() if weight_BT.numel() else weight_BT.sum()
    relative_BT = weight_BT / largest.clamp(min=torch.finfo(torch.float32).tiny)
    squares = relative_BT.square().sum() * num_tokens
    return {
        "rollout_corr/kl": masked_mean(-bounded_BT, is_on_BT),
        "rollout_corr/k3_kl": masked_mean(bounded_BT.expm1() - bounded_BT, is_on_BT),
        "rollout_corr/chi2_token": masked_mean((2 * bounded_BT).expm1(), is_on_BT),
        "rollout_corr/ess": relative_BT.sum().square() / torch.where(squares > 0, squares, 1.0),
        "rollout_corr/masked_fraction": masked_mean(weight_BT == 0, is_on_BT),
    }
