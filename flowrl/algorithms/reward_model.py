"""A learned reward. Owns where a response's score is read, how the model is trained, and how its scores are tamed.

Legend: `D` hidden size, `K` members of an ensemble.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl.algorithms.masked import check_shapes
from flowrl.algorithms.preference import PairLoss, logistic_pairs

ENSEMBLE_MODES = ("mean", "mean-std", "min")


def last_token_state(hidden_BTD: Tensor, attention_mask_BT: Tensor) -> Tensor:
    """The hidden state of each row's last token that is not padding, on whichever side the padding is. -> (B, D)."""
    is_on_BT = attention_mask_BT > 0
    if not bool(is_on_BT.any(dim=1).all()):
        raise ValueError("attention_mask_BT: a row without a token; a reward model needs something to score")
    position_T = torch.arange(is_on_BT.shape[1], device=is_on_BT.device)
    last_B = (position_T * is_on_BT).amax(dim=1)
    return hidden_BTD[torch.arange(len(last_B), device=last_B.device), last_B]


def bradley_terry(chosen_B: Tensor, rejected_B: Tensor, margin: Tensor | float = 0.0) -> PairLoss:
    """-log σ(r_chosen - r_rejected - margin). Bradley and Terry 1952; the margin: Llama 2, section 3.2.2."""
    check_shapes(chosen_B, rejected_B=rejected_B)
    return logistic_pairs(chosen_B.float() - rejected_B.float(), margin)


def ensemble(score_KB: Tensor, mode: str = "mean", k: float = 1.0) -> tuple[Tensor, Tensor]:
    """-> (reward_B, uncertainty_B). Uncertainty: the members' standard deviation (ddof 1; 0 for one member).

    mode: "mean"; "mean-std", mean - k·std; "min". The last two are pessimistic (Coste et al. 2024).
    """
    if mode not in ENSEMBLE_MODES:
        raise ValueError(f"mode: {mode!r}; must be one of {', '.join(ENSEMBLE_MODES)}")
    score_KB = score_KB.float()
    mean_B = score_KB.mean(dim=0)
    std_B = score_KB.std(dim=0) if len(score_KB) > 1 else torch.zeros_like(mean_B)
    if mode == "mean":
        return mean_B, std_B
    return (score_KB.amin(dim=0) if mode == "min" else mean_B - k * std_B), std_B


def clip_reward(reward_B: Tensor, limit: float = 10.0) -> Tensor:
    """To ±limit: an outlier of a learned reward must not own the update."""
    return reward_B.float().clamp(-limit, limit)


@dataclass(frozen=True, kw_only=True)
class RewardScale:
    """Running mean and spread of all rewards seen, as plain numbers (a checkpoint stores them). Never changes: `seen`
    gives a new one. `spread` is the sum of squared deviations."""

    count: int = 0
    mean: float = 0.0
    spread: float = 0.0

    def seen(self, reward_B: Tensor) -> RewardScale:
        """With one more batch (Chan et al. 1983: exact, whatever the split into batches)."""
        added = reward_B.numel()
        if added == 0:
            return self
        batch_B = reward_B.double()
        batch_mean = float(batch_B.mean())
        count = self.count + added
        shift = batch_mean - self.mean
        spread = self.spread + float((batch_B - batch_mean).square().sum()) + shift**2 * self.count * added / count
        return RewardScale(count=count, mean=self.mean + shift * added / count, spread=spread)

    def normalise(self, reward_B: Tensor, eps: float = 1e-8) -> Tensor:
        """(r - mean)/(std + eps), std with ddof 1; before two different rewards were seen, r - mean."""
        std = (self.spread / (self.count - 1)) ** 0.5 if self.count > 1 else 0.0
        return (reward_B.float() - self.mean) / (std + eps if std > 0 else 1.0)
