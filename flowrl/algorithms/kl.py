"""Distance from a reference policy. Owns the KL estimators, their coefficient over time, and where the KL enters.

d = logprob - ref_logprob of a token that the policy sampled. Estimators: Schulman 2020, "Approximating KL divergence".
"""

from __future__ import annotations

from torch import Tensor

from flowrl.algorithms.masked import MAX_LOGRATIO, masked_mean, only

MAX_K3 = 10.0


def k1(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """d. Unbiased in value, high variance; its gradient is 0 on average, so it belongs in the reward."""
    return logprob.float() - ref_logprob.float()


def k2(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """d²/2. Biased in value; its gradient is that of the KL."""
    return k1(logprob, ref_logprob).square() / 2


def k3(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """e^{-d} + d - 1, d clamped to ±20, the result to ±10. Unbiased in value inside the clamps, never negative."""
    d = k1(logprob, ref_logprob).clamp(-MAX_LOGRATIO, MAX_LOGRATIO)
    return ((-d).expm1() + d).clamp(-MAX_K3, MAX_K3)


def k3_plus(logprob: Tensor, ref_logprob: Tensor) -> Tensor:
    """The value of k3 with the gradient of k2."""
    squared = k2(logprob, ref_logprob)
    return k3(logprob, ref_logprob).detach() + (squared - squared.detach())


ESTIMATORS = {"k1": k1, "k2": k2, "k3": k3, "k3_plus": k3_plus}


def mean_kl(kl_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """The token mean, which a controller is told; 0 if no token counts."""
    return masked_mean(kl_BT, mask_BT > 0)


def penalised_reward(reward_BT: Tensor, kl_BT: Tensor, mask_BT: Tensor, coef: float) -> Tensor:
    """KL in the reward: reward - coef·kl on tokens that count, 0 elsewhere. No gradient. Ziegler et al. 2019."""
    return only(reward_BT - coef * kl_BT.detach(), mask_BT > 0)


def kl_loss(logprob_BT: Tensor, ref_logprob_BT: Tensor, mask_BT: Tensor, coef: float, estimator: str = "k3") -> Tensor:
    """KL in the loss: coef·kl for each token, added to the policy loss before aggregation. DeepSeekMath, eq. 3."""
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator: {estimator!r}; must be one of {', '.join(ESTIMATORS)}")
    is_on_BT = mask_BT > 0
    kl_BT = ESTIMATORS[estimator](only(logprob_BT, is_on_BT), only(ref_logprob_BT.detach(), is_on_BT))
    return only(coef * kl_BT, is_on_BT)


def is_past_target(mean_k3: float, target: float, factor: float = 1.5) -> bool:
    """Whether PPO should stop its epochs: the policy has gone further than factor·target from its anchor."""
    return mean_k3 > factor * target


class FixedKL:
    """A coefficient that stays."""

    def __init__(self, coef: float) -> None:
        if coef < 0:
            raise ValueError(f"coef: {coef}; a KL coefficient must not be negative")
        self.value = coef

    def update(self, kl: float, num_samples: int) -> float:
        return self.value


class AdaptiveKL:
    """A coefficient that seeks a KL: β ← β·(1 + clip(KL/target - 1, ±0.2)·n/horizon). Ziegler et al. 2019.

    `value` is all its state: a checkpoint saves it and sets it again. `horizon` counts samples.
    """

    def __init__(self, init: float, target: float = 0.1, horizon: float = 10000) -> None:
        for name, setting in (("init", init), ("target", target), ("horizon", horizon)):
            if setting <= 0:
                raise ValueError(f"{name}: {setting}; must be positive")
        self.value = init
        self.target = target
        self.horizon = horizon

    def update(self, kl: float, num_samples: int) -> float:
        """`kl`: the token mean over the last `num_samples` samples. Returns the new coefficient."""
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * num_samples / self.horizon
        return self.value
