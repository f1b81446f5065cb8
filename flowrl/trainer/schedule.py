"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, warmup_steps: int, schedule: str, decay_steps: int, final_ratio: float
) -> float:
    """Rises linearly to `peak`, reached at step `warmup_steps`, then `constant`, or `linear` or `cosine` down to
    `final_ratio * peak` at step `decay_steps` and level from there. Step 0 is the first and already above 0."""
    if step < warmup_steps:
        return peak * (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return peak
    progress = min(1.0, (step - warmup_steps) / max(1, decay_steps - warmup_steps))
    if schedule == "linear":
        remaining = 1.0 - progress
    elif schedule == "cosine":
        remaining = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        raise ValueError(f"train.schedule: {schedule!r}; must be one of constant, linear, cosine")
    return peak * (final_ratio + (1.0 - final_ratio) * remaining)
