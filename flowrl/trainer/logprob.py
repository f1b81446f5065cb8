"""Log-probabilities and entropies of given tokens, from hidden states, without ever holding all logits.

Shapes: R tokens; H hidden size; V vocabulary; C tokens of one chunk.

Forward and backward go over chunks of tokens, small enough that C x V stays within a fixed number of elements; the
backward computes the logits of its chunk anew. Entropy costs the backward nothing where nobody asks for its gradient.
"""

from __future__ import annotations

from typing import Any

import torch

# Of float32, two or three of which are alive at a time: small enough for caches, large enough for a GPU to be busy.
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_R: torch.Tensor,
        temperature: float,
        chunk_elements: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature = temperature
        ctx.chunk_tokens = max(1, chunk_elements // weight_VH.shape[0])
        logprobs, entropies, lses = [], [], []
        for hidden_CH, target_C in zip(
            hidden_RH.split(ctx.chunk_tokens), target_R.split(ctx.chunk_tokens), strict=True
        ):
            logit_CV = _logits(hidden_CH, weight_VH, temperature)
            lse_C = logit_CV.logsumexp(-1)
            logprob_CV = logit_CV.sub_(lse_C[:, None])
            logprobs.append(logprob_CV.gather(-1, target_C[:, None])[:, 0])
            # Not lse - Σ p·logit: both are large where the distribution is sharp, and their difference small.
            entropies.append(-logprob_CV.exp().mul_(logprob_CV).sum(-1))
            lses.append(lse_C)
        entropy_R = torch.cat(entropies)
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, torch.cat(lses), entropy_R)
        ctx.set_materialize_grads(False)
        return torch.cat(logprobs), entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden_RH, weight_VH, target_R, lse_R, entropy_R = ctx.saved_tensors
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=lse_R.dtype)
        grad_logprob_R = torch.zeros_like(lse_R) if grads[0] is None else grads[0]
        grad_hidden = []
        for place, (hidden_CH, target_C, lse_C, grad_C) in enumerate(
            zip(*(x.split(ctx.chunk_tokens) for x in (hidden_RH, target_R, lse_R, grad_logprob_R)), strict=True)
        ):
            logprob_CV = _logits(hidden_CH, weight_VH, ctx.temperature) - lse_C[:, None]
            scale_C1 = (grad_C / ctx.temperature)[:, None]
            if grads[1] is None:
                grad_logit_CV = logprob_CV.exp_().mul_(-scale_C1)
            else:
                chunk = slice(place * ctx.chunk_tokens, place * ctx.chunk_tokens + len(lse_C))
                bonus_C1 = (grads[1][chunk] / ctx.temperature)[:, None]
                # dH/dz = -p·(log p + H)
                slope_CV = (logprob_CV + entropy_R[chunk, None]).mul_(-bonus_C1).sub_(scale_C1)
                grad_logit_CV = logprob_CV.exp_().mul_(slope_CV)
            grad_logit_CV = grad_logit_CV.scatter_add_(1, target_C[:, None], scale_C1)
            grad_logit_CV = grad_logit_CV.to(weight_VH.dtype)
            grad_hidden.append(grad_logit_CV @ weight_VH)
            _add_product(grad_weight_VH, grad_logit_CV.T, hidden_CH)
        return torch.cat(grad_hidden), grad_weight_VH.to(weight_VH.dtype), None, None, None


def _add_product(sum_VH: torch.Tensor, left_VC: torch.Tensor, right_CH: torch.Tensor) -> None:
    """In place where the dtypes allow it: a second V x H would double the peak of a small batch."""
    if sum_VH.dtype == left_VC.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    else:
        sum_VH += left_VC @ right_CH


def _logits(hidden_CH: torch.Tensor, weight_VH: torch.Tensor, temperature: float) -> torch.Tensor:
    logit_CV = hidden_CH @ weight_VH.T
    logit_CV = logit_CV.to(torch.promote_types(logit_CV.dtype, torch.float32))
    return logit_CV if temperature == 1.0 else logit_CV.div_(temperature)


def token_logprobs(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    temperature: float = 1.0,
    chunk_elements: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (logprob_R, entropy_R) of softmax(hidden @ weight.T / temperature), in float32 or better.

    Raises ValueError for a temperature that is not positive: a greedy distribution has no log-probs to train on.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; must be above 0 to train on log-probs")
    if chunk_elements is None:
        chunk_elements = CHUNK_ELEMENTS[hidden_RH.device.type]
    logprob_R, entropy_R = _TokenLogprob.apply(hidden_RH, weight_VH, target_R, temperature, chunk_elements)
    return logprob_R, entropy_R
