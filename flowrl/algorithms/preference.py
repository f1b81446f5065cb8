"""Learning from pairs: one response chosen, one rejected. Owns the logistic pair loss and DPO; knows no reward head."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor
from torch.nn.functional import softplus

from flowrl.algorithms.masked import check_shapes


class PairLoss(NamedTuple):
    """loss_B: a loss for each pair, carrying the gradient. metrics: detached scalars, means over the pairs."""

    loss_B: Tensor
    metrics: dict[str, Tensor]


def logistic_pairs(lead_B: Tensor, offset: Tensor | float = 0.0) -> PairLoss:
    """-log σ(lead - offset), where `lead_B` is by how much the chosen one is ahead; accuracy: lead > 0."""
    lead_B = lead_B.float()
    metrics = {
        "pair/accuracy": (lead_B > 0).float().sum() / max(len(lead_B), 1),
        "pair/margin": lead_B.detach().sum() / max(len(lead_B), 1),
    }
    return PairLoss(softplus(offset - lead_B), metrics)


def dpo(
    chosen_logprob_B: Tensor,
    rejected_logprob_B: Tensor,
    ref_chosen_logprob_B: Tensor,
    ref_rejected_logprob_B: Tensor,
    beta: float = 0.1,
) -> PairLoss:
    """-log σ(β[(π_c - ref_c) - (π_r - ref_r)]), each the log-prob of a whole response. Rafailov et al. 2023, eq. 7."""
    if beta <= 0:
        raise ValueError(f"beta: {beta}; must be positive")
    check_shapes(
        chosen_logprob_B,
        rejected_logprob_B=rejected_logprob_B,
        ref_chosen_logprob_B=ref_chosen_logprob_B,
        ref_rejected_logprob_B=ref_rejected_logprob_B,
    )
    chosen_B = beta * (chosen_logprob_B.float() - ref_chosen_logprob_B.detach().float())
    rejected_B = beta * (rejected_logprob_B.float() - ref_rejected_logprob_B.detach().float())
    return logistic_pairs(chosen_B - rejected_B)
