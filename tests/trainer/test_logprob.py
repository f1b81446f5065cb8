"""Chunked log-probs and entropies equal the naive ones over all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl.trainer.logprob import token_logprobs

R, H, V = 37, 3, 101


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden_RH = torch.randn(R, H, dtype=dtype, requires_grad=True)
    weight_VH = torch.randn(V, H, dtype=dtype, requires_grad=True)
    return hidden_RH, weight_VH, torch.randint(0, V, (R,))


@pytest.mark.parametrize("chunk_tokens", [1, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_naive_float64(chunk_tokens: int, temperature: float) -> None:
    hidden_RH, weight_VH, target_R = inputs(torch.float32)
    upstream_R, of_entropy_R = torch.randn(2, R)
    logprob_R, entropy_R = token_logprobs(hidden_RH, weight_VH, target_R, temperature, chunk_tokens)
    (logprob_R * upstream_R + entropy_R * of_entropy_R).sum().backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden_RH, weight_VH))
    every_RV = (exact_hidden @ exact_weight.T / temperature).log_softmax(-1)
    exact_R, exact_entropy_R = every_RV[torch.arange(R), target_R], -(every_RV.exp() * every_RV).sum(-1)
    (exact_R * upstream_R + exact_entropy_R * of_entropy_R).sum().backward()
    assert hidden_RH.grad is not None and weight_VH.grad is not None
    torch.testing.assert_close(logprob_R.double(), exact_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_R.double(), exact_entropy_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_RH.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight_VH.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("output", [0, 1, slice(None)])
def test_backward_is_the_derivative_of_forward(output: int | slice) -> None:
    """Of log-probs alone, of entropies alone, of both."""
    hidden_RH, weight_VH, target_R = inputs(torch.float64)
    few = (hidden_RH[:3].detach().requires_grad_(), weight_VH[:23].detach().requires_grad_(), target_R[:3] % 23)
    assert torch.autograd.gradcheck(lambda h, w, t: token_logprobs(h, w, t, 0.9, 2)[output], few)


def test_no_tensor_of_tokens_times_vocabulary_is_made_in_either_direction() -> None:
    """But for the gradient of the head, nothing is larger than a chunk."""
    hidden_RH, weight_VH, target_R = inputs(torch.float32)
    with Largest() as largest:
        logprob_R, entropy_R = token_logprobs(hidden_RH, weight_VH, target_R, 0.7, 4)
        (logprob_R + 0.1 * entropy_R).sum().backward()
    assert largest.num_elements == max(4 * V, V * H)


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation inside gives, forward or backward."""

    num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    hidden_RH, weight_VH, target_R = inputs(torch.bfloat16)
    logprob_R, entropy_R = token_logprobs(hidden_RH, weight_VH, target_R)
    logprob_R.sum().backward()
    assert logprob_R.dtype == entropy_R.dtype == torch.float32
    assert weight_VH.grad is not None and weight_VH.grad.dtype == torch.bfloat16
    exact_R = (hidden_RH.float() @ weight_VH.float().T).log_softmax(-1)[torch.arange(R), target_R]
    torch.testing.assert_close(logprob_R, exact_R, rtol=0.02, atol=0.1)


def test_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match=r"temperature: 0.*above 0"):
        token_logprobs(*inputs(torch.float32), 0.0)
