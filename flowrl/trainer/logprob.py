"""Log-probabilities and entropies of given tokens, from hidden states, without ever holding all logits.

Shapes: R tokens; H hidden size; V vocabulary; C tokens of one chunk.

Forward and backward go over chunks of tokens, small enough that C x V stays within a fixed number of elements; the
backward computes the logits of its chunk anew. All chunks use the same buffers in turn: fresh memory of that size costs
a CPU more, in page faults, than what is computed in it. Entropy costs the backward nothing where nobody asks for its
gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Of float32, two of which are alive at a time: small enough for caches, large enough for a GPU to be busy. No chunk has
# fewer than LEAST_TOKENS, or each of them would spend its time on reading the head.
CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 27}
LEAST_TOKENS = {"cpu": 64, "cuda": 1}


class _Chunks:
    """The logits of R tokens, a chunk at a time, in one buffer: a chunk may be overwritten until the next is made."""

    def __init__(self, hidden_RH: torch.Tensor, weight_VH: torch.Tensor, temperature: float, chunk_tokens: int) -> None:
        self._hidden_RH = hidden_RH
        self._weight_VH = weight_VH
        self._temperature = temperature
        self._num_tokens = min(chunk_tokens, len(hidden_RH))
        self.dtype = torch.promote_types(hidden_RH.dtype, torch.float32)
        self._logit_CV = self.buffer()
        self._product_CV = self._logit_CV if self.dtype == hidden_RH.dtype else self.buffer(hidden_RH.dtype)

    def buffer(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As large as a chunk, not filled."""
        shape = (self._num_tokens, len(self._weight_VH))
        return torch.empty(shape, dtype=dtype or self.dtype, device=self._hidden_RH.device)

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """(which tokens, logit_CV of them)."""
        for start in range(0, len(self._hidden_RH), max(1, self._num_tokens)):
            chunk = slice(start, min(start + self._num_tokens, len(self._hidden_RH)))
            count = chunk.stop - chunk.start
            logit_CV = self._logit_CV[:count]
            product_CV = torch.mm(self._hidden_RH[chunk], self._weight_VH.T, out=self._product_CV[:count])
            if product_CV.dtype != self.dtype:
                logit_CV.copy_(product_CV)
            yield chunk, logit_CV if self._temperature == 1.0 else logit_CV.div_(self._temperature)

    def lowered(self, x_CV: torch.Tensor) -> torch.Tensor:
        """In the dtype of the head, for products with it."""
        return x_CV if x_CV.dtype == self._product_CV.dtype else self._product_CV[: len(x_CV)].copy_(x_CV)


class _TokenLogprob(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_RH: torch.Tensor,
        weight_VH: torch.Tensor,
        target_R: torch.Tensor,
        temperature: float,
        chunk_tokens: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.temperature = temperature
        ctx.chunk_tokens = chunk_tokens
        chunks = _Chunks(hidden_RH, weight_VH, temperature, chunk_tokens)
        buffer_CV = chunks.buffer()
        logprob_R, entropy_R, lse_R = (hidden_RH.new_empty(len(hidden_RH), dtype=chunks.dtype) for _ in range(3))
        for chunk, logit_CV in chunks:
            most_C1 = logit_CV.amax(-1, keepdim=True)
            weight_CV = torch.exp(logit_CV.sub_(most_C1), out=buffer_CV[: len(logit_CV)])
            total_C1 = weight_CV.sum(-1, keepdim=True)
            log_total_C1 = total_C1.log()
            logprob_CV = logit_CV.sub_(log_total_C1)
            logprob_R[chunk] = logprob_CV.gather(-1, target_R[chunk, None])[:, 0]
            # Not lse - Σ p·logit: both are large where the distribution is sharp, and their difference small.
            entropy_R[chunk] = -(weight_CV.mul_(logprob_CV).sum(-1) / total_C1[:, 0])
            lse_R[chunk] = (most_C1 + log_total_C1)[:, 0]
        ctx.save_for_backward(hidden_RH, weight_VH, target_R, lse_R, entropy_R)
        ctx.set_materialize_grads(False)
        return logprob_R, entropy_R

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        hidden_RH, weight_VH, target_R, lse_R, entropy_R = ctx.saved_tensors
        chunks = _Chunks(hidden_RH, weight_VH, ctx.temperature, ctx.chunk_tokens)
        scale_R1, bonus_R1 = (None if grad is None else (grad / ctx.temperature)[:, None] for grad in grads)
        if scale_R1 is None:
            scale_R1 = torch.zeros_like(lse_R)[:, None]
        buffer_CV = chunks.buffer() if bonus_R1 is not None else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=lse_R.dtype)
        grad_hidden_RH = torch.empty_like(hidden_RH)
        for chunk, logit_CV in chunks:
            scale_C1 = scale_R1[chunk]
            logprob_CV = logit_CV.sub_(lse_R[chunk, None])
            if bonus_R1 is None or buffer_CV is None:
                grad_logit_CV = logprob_CV.exp_().mul_(-scale_C1)
            else:
                # dH/dz = -p·(log p + H)
                slope_CV = torch.add(logprob_CV, entropy_R[chunk, None], out=buffer_CV[: len(logprob_CV)])
                slope_CV.mul_(-bonus_R1[chunk]).sub_(scale_C1)
                grad_logit_CV = logprob_CV.exp_().mul_(slope_CV)
            grad_logit_CV.scatter_add_(1, target_R[chunk, None], scale_C1)
            lowered_CV = chunks.lowered(grad_logit_CV)
            torch.mm(lowered_CV, weight_VH, out=grad_hidden_RH[chunk])
            _add_product(grad_weight_VH, lowered_CV.T, hidden_RH[chunk])
        return grad_hidden_RH, grad_weight_VH.to(weight_VH.dtype), None, None, None


def _add_product(sum_VH: torch.Tensor, left_VC: torch.Tensor, right_CH: torch.Tensor) -> None:
    """In place where the dtypes allow it: a second V x H would double the peak of a small batch."""
    if sum_VH.dtype == left_VC.dtype:
        sum_VH.addmm_(left_VC, right_CH)
    else:
        sum_VH += left_VC @ right_CH


def token_logprobs(
    hidden_RH: torch.Tensor,
    weight_VH: torch.Tensor,
    target_R: torch.Tensor,
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (logprob_R, entropy_R) of softmax(hidden @ weight.T / temperature), in float32 or better.

    Raises ValueError for a temperature that is not positive: a greedy distribution has no log-probs to train on.
    """
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature}; must be above 0 to train on log-probs")
    if chunk_tokens is None:
        kind = hidden_RH.device.type
        chunk_tokens = max(LEAST_TOKENS[kind], CHUNK_ELEMENTS[kind] // len(weight_VH))
    logprob_R, entropy_R = _TokenLogprob.apply(hidden_RH, weight_VH, target_R, temperature, chunk_tokens)
    return logprob_R, entropy_R
