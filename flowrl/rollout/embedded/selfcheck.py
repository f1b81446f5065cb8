"""Does an architecture compute in slots what it computes by itself? Asked once, when a model is loaded.

Slots serve any model whose attention is a softmax over its own keys. One that keeps other state, or weighs keys
otherwise, would silently sample from another distribution. So a few tokens are generated and compared with a plain
forward.
"""

from __future__ import annotations

import numpy as np
import torch
from transformers import PreTrainedModel

from flowrl.rollout.embedded.attention import SLOT_ATTENTION
from flowrl.rollout.engine import GenerateRequest, Generation, SamplingParams

# In log-prob. Kernels of float32 differ by 1e-5, of 16 bits by rounding; another context by far more.
_TOLERANCE_32_BITS = 1e-2
_TOLERANCE_16_BITS = 0.5


def probe(vocab_size: int, max_model_tokens: int) -> GenerateRequest:
    """A request for the answer that `check` takes."""
    num_new = min(4, max_model_tokens - 1)
    prompt = np.random.default_rng(0).integers(vocab_size, size=min(6, max_model_tokens - num_new))
    return GenerateRequest(
        request_id="probe", tokens=tuple(prompt.tolist()), sampling=SamplingParams(max_tokens=num_new, seed=0)
    )


@torch.inference_mode()
def check(model: PreTrainedModel, request: GenerateRequest, generated: Generation) -> None:
    """ValueError where the log-probs of `generated` are not those of the model's own eager attention."""
    tokens = torch.tensor([*request.tokens, *generated.tokens.tolist()], device=model.device)
    model.set_attn_implementation("eager")
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, len(request.tokens) - 1 : -1]
    model.set_attn_implementation(SLOT_ATTENTION)
    new_tokens = tokens[len(request.tokens) :, None]
    expected = torch.log_softmax(logits.float(), dim=-1).gather(1, new_tokens)[:, 0]
    error = float(np.abs(expected.cpu().numpy() - generated.logprobs).max())
    tolerance = _TOLERANCE_16_BITS if model.dtype.itemsize < 4 else _TOLERANCE_32_BITS
    if not error <= tolerance:
        raise ValueError(
            f"model: {type(model).__name__} is not one for the embedded engine: its log-probs differ by {error:.3g} "
            f"from its own forward's, {tolerance} is allowed"
        )
