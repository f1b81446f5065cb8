"""Terms beside the policy loss: entropy bonus, length penalty, supervised loss. Owns no KL (see `kl`).

Legend: `V` the vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.algorithms.masked import check_shapes, only


def token_entropy(logits_BTV: Tensor) -> Tensor:
    """H of each token's distribution, in nats. -> (B, T)."""
    logprob_BTV = logits_BTV.float().log_softmax(dim=-1)
    # A token ruled out has log-prob -inf and adds nothing; 0·(-inf) would be NaN.
    return -(logprob_BTV.exp() * logprob_BTV.masked_fill(logprob_BTV == -torch.inf, 0.0)).sum(dim=-1)


def entropy_bonus(entropy_BT: Tensor, mask_BT: Tensor, coef: float) -> Tensor:
    """-coef·H for each token, to be added to the policy loss before aggregation. Williams and Peng 1991."""
    check_shapes(entropy_BT, mask_BT=mask_BT)
    return only(-coef * entropy_BT, mask_BT > 0)


def overlong_penalty(length: Tensor | int, max_length: int, buffer: int) -> Tensor:
    """Added to the reward: 0 up to max_length - buffer, then linear to -1 at max_length. Lengths in tokens.

    Yu et al. 2025 (DAPO), section 3.4.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer: {buffer}; must be in [1, max_length], here {max_length}")
    excess = torch.as_tensor(length, dtype=torch.float32) - (max_length - buffer)
    return (-excess / buffer).clamp(-1.0, 0.0)


def sft_loss(logprob_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Negative log-likelihood of each response token; its loss is the token mean."""
    check_shapes(logprob_BT, mask_BT=mask_BT)
    return only(-logprob_BT, mask_BT > 0)
