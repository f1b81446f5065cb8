"""Which experts each token of a sequence went through, from the generations that made it. Pure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flowrl.rollout.engine import Generation

UNKNOWN = -1


def joined_experts(parts: Sequence[Generation], num_tokens: int) -> np.ndarray | None:
    """int32 (num_tokens - 1, layers, experts), of a sequence of `num_tokens` with its prompt, which `parts` continued
    one after the other. Of a token that several of them read, the first says; UNKNOWN where none does, as of one that
    was aborted while it waited. None if no part says anything."""
    said = [part.routed_experts for part in parts if part.routed_experts is not None]
    if not said:
        return None
    joined = np.full((num_tokens - 1, *said[0].shape[1:]), UNKNOWN, dtype=np.int32)
    for rows in reversed(said):
        joined[: len(rows)] = rows
    return joined
