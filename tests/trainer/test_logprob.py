"""Chunked log-probs and entropies equal the naive ones over all logits."""

from __future__ import annotations

import pytest
import torch

from flowrl.trainer.logprob import token_logprobs

R, H, V = 37, 16, 101


def inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    hidden_RH = torch.randn(R, H, dtype=dtype, requires_grad=True)
    weight_VH = torch.randn(V, H, dtype=dtype, requires_grad=True)
    return hidden_RH, weight_VH, torch.randint(0, V, (R,))


@pytest.mark.parametrize("chunk_tokens", [1, 10, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_values_and_gradients_equal_naive_float64(chunk_tokens: int, temperature: float) -> None:
    hidden_RH, weight_VH, target_R = inputs(torch.float32)
    upstream_R = torch.randn(R)
    logprob_R, entropy_R = token_logprobs(hidden_RH, weight_VH, target_R, temperature, chunk_tokens * V)
    (logprob_R * upstream_R).sum().backward()
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden_RH, weight_VH))
    every_RV = (exact_hidden @ exact_weight.T / temperature).log_softmax(-1)
    exact_R = every_RV[torch.arange(R), target_R]
    (exact_R * upstream_R).sum().backward()
    assert hidden_RH.grad is not None and weight_VH.grad is not None
    torch.testing.assert_close(logprob_R.double(), exact_R, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy_R.double(), -(every_RV.exp() * every_RV).sum(-1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hidden_RH.grad.double(), exact_hidden.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weight_VH.grad.double(), exact_weight.grad, rtol=1e-4, atol=1e-5)


def test_backward_is_the_derivative_of_forward() -> None:
    hidden_RH, weight_VH, target_R = inputs(torch.float64)
    few = (hidden_RH[:5].detach().requires_grad_(), weight_VH, target_R[:5])
    assert torch.autograd.gradcheck(lambda h, w, t: token_logprobs(h, w, t, 0.9, 2 * V)[0], few)


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
