"""From the protocol's requests to SGLang's bodies, and from its answers to generations. Pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from flowrl.rollout.engine import FinishReason, GenerateRequest, Generation
from flowrl.rollout.sglang.client import GenerateAnswer, GenerateBody, SamplingBody
from flowrl.rollout.sglang.versions import token_versions
from flowrl.rollout.stop_strings import Decode, first_stop


def generate_body(request: GenerateRequest, rid: str, extra_key: str) -> GenerateBody:
    """A server stops at its model's own end-of-sequence too, unless told to ignore all stops: then at none."""
    sampling = request.sampling
    return GenerateBody(
        rid=rid,
        input_ids=request.tokens,
        extra_key=extra_key,
        sampling_params=SamplingBody(
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=not sampling.stop_token_ids,
            sampling_seed=sampling.seed,
        ),
    )


def generation(answer: GenerateAnswer, sent_under: int, replaced_ahead: Collection[int]) -> Generation:
    """ValueError for an answer that contradicts itself or holds a token without a log-prob or a version."""
    meta = answer.meta_info
    entries = meta.output_token_logprobs
    logprobs = np.array([entry[0] for entry in entries], dtype=np.float32)
    if not np.isfinite(logprobs).all():
        raise ValueError(f"output_token_logprobs: {logprobs}; every token needs a finite one")
    return Generation(
        tokens=np.array([entry[1] for entry in entries], dtype=np.int32),
        logprobs=logprobs,
        versions=token_versions(meta.weight_versions, len(entries), sent_under, replaced_ahead),
        finish_reason=FinishReason(meta.finish_reason.type),
    )


def cut_at_stop(made: Generation, stops: Sequence[str], decode: Decode) -> Generation:
    """The response up to its first stop string. A server without a tokenizer sees none, and goes on to the end."""
    count = first_stop(made.tokens.tolist(), stops, decode)
    if count is None:
        return made
    return Generation(
        tokens=made.tokens[:count],
        logprobs=made.logprobs[:count],
        versions=made.versions[:count],
        finish_reason=FinishReason.STOP,
    )


def nothing_generated() -> Generation:
    """What a request has that was aborted before any server saw it."""
    return Generation(
        tokens=np.empty(0, dtype=np.int32),
        logprobs=np.empty(0, dtype=np.float32),
        versions=np.empty(0, dtype=np.int32),
        finish_reason=FinishReason.ABORT,
    )
