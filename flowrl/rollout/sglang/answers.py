"""From the protocol's requests to SGLang's bodies, and from its answers to generations. Pure."""

from __future__ import annotations

import base64
import dataclasses
from collections.abc import Collection, Sequence

import msgspec
import numpy as np

from flowrl.rollout.engine import FinishReason, GenerateRequest, Generation
from flowrl.rollout.sglang.client import Entry, GenerateBody, GenerateMeta, SamplingBody
from flowrl.rollout.sglang.versions import token_versions
from flowrl.rollout.stop_strings import Decode, first_stop

# Tokens between two parts of a stream: few are written beyond a stop string, and few parts are sent.
STREAM_INTERVAL = 4


def generate_body(request: GenerateRequest, rid: str, extra_key: str, has_experts: bool = False) -> GenerateBody:
    """A server stops at its model's own end-of-sequence too, unless told to ignore all stops: then at none. It sees no
    stop strings; a response that has some is streamed, and ended by who reads it."""
    sampling = request.sampling
    return GenerateBody(
        rid=rid,
        input_ids=request.tokens,
        extra_key=extra_key,
        return_logprob=True,
        stream=bool(sampling.stop_strings),
        return_routed_experts=has_experts,
        sampling_params=SamplingBody(
            max_new_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k or -1,
            min_p=sampling.min_p,
            stop_token_ids=sampling.stop_token_ids,
            ignore_eos=not sampling.stop_token_ids,
            sampling_seed=sampling.seed,
            stream_interval=STREAM_INTERVAL if sampling.stop_strings else None,
        ),
    )


class Parts:
    """A response as it is streamed."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._entries: list[Entry] = []

    def add(self, part: GenerateMeta) -> int:
        """How many tokens are new. A part says where it ends, and so whether it begins at the response's start."""
        before = len(self.tokens)
        start = part.completion_tokens - len(part.output_token_logprobs)
        if not 0 <= start <= before:
            raise ValueError(f"completion_tokens: {part.completion_tokens}; a part with a gap before it")
        self._entries[start:] = part.output_token_logprobs
        self.tokens[start:] = [token for _, token, _ in part.output_token_logprobs]
        return len(self.tokens) - before

    def whole(self, last: GenerateMeta) -> GenerateMeta:
        """The last part, with all tokens."""
        return msgspec.structs.replace(last, output_token_logprobs=self._entries)


def generation(
    meta: GenerateMeta, sent_under: int, replaced_ahead: Collection[int], experts: tuple[int, int] | None = None
) -> Generation:
    """experts: (layers, experts a token), where they were asked for. ValueError for an answer that contradicts itself
    or holds a token without a log-prob or a version."""
    entries = meta.output_token_logprobs
    logprobs = np.array([entry[0] for entry in entries], dtype=np.float32)
    if meta.finish_reason is None:
        raise ValueError("finish_reason: none; the answer broke off")
    if not np.isfinite(logprobs).all():
        raise ValueError(f"output_token_logprobs: {logprobs}; every token needs a finite one")
    return Generation(
        tokens=np.array([entry[1] for entry in entries], dtype=np.int32),
        logprobs=logprobs,
        versions=token_versions(meta.weight_versions, len(entries), sent_under, replaced_ahead),
        finish_reason=FinishReason(meta.finish_reason.type),
        routed_experts=_routed_experts(meta.routed_experts, experts),
    )


def cut_at_stop(made: Generation, stops: Sequence[str], decode: Decode) -> Generation:
    """The response up to its first stop string."""
    count = first_stop(made.tokens.tolist(), stops, decode)
    if count is None:
        return made
    experts, beyond = made.routed_experts, len(made.tokens) - count
    return dataclasses.replace(
        made,
        tokens=made.tokens[:count],
        logprobs=made.logprobs[:count],
        versions=made.versions[:count],
        finish_reason=FinishReason.STOP,
        routed_experts=None if experts is None else experts[: len(experts) - beyond],
    )


def nothing_generated() -> Generation:
    """What a request has that was aborted before any server saw it."""
    return Generation(
        tokens=np.empty(0, dtype=np.int32),
        logprobs=np.empty(0, dtype=np.float32),
        versions=np.empty(0, dtype=np.int32),
        finish_reason=FinishReason.ABORT,
    )


def _routed_experts(encoded: str | None, shape: tuple[int, int] | None) -> np.ndarray | None:
    if encoded is None or shape is None:
        return None
    return np.frombuffer(base64.b64decode(encoded), dtype=np.int32).reshape(-1, *shape)
