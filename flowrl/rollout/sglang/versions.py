"""Which weights sampled which token, from what the server says and how its weights were replaced. Pure.

SGLang notes a request's length when the weights change and calls everything after it new. It also prepares steps ahead:
when it pauses *in place*, the result of its last step may still wait to be read, a token that the old weights sampled
and that will be counted as new. So the first token after such a change is given to the weights before it. For a request
that had no part in that last step this errs by one token towards the older version: no version named here is newer than
the weights that sampled the token.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from flowrl.rollout.sglang.client import VersionSpan


def token_versions(
    spans: Sequence[VersionSpan], num_tokens: int, sent_under: int, replaced_ahead: Collection[int]
) -> np.ndarray:
    """int32 (num_tokens,). sent_under: the version in force when the request was sent. replaced_ahead: versions that
    came in place while steps were prepared ahead. ValueError if the spans leave a token without a version."""
    versions = np.empty(num_tokens, dtype=np.int32)
    previous, end = sent_under, 0
    for span in spans:
        if span.start != end or span.end < span.start:
            raise ValueError(f"weight_versions: {list(spans)}; a span must begin where the one before it ended")
        version = int(span.version)
        versions[span.start : span.end] = version
        if version in replaced_ahead and span.start < span.end:
            versions[span.start] = min(previous, version)
        previous, end = version, span.end
    if end != num_tokens:
        raise ValueError(f"weight_versions: {list(spans)}; {num_tokens} tokens need one each")
    return versions
