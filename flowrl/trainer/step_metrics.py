"""From the totals of an update's steps to its metrics, under the field's names. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowrl.trainer.totals import spreads

_MAXIMA = ("_max", "/max", "/-min")


def step_metrics(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the tokens that went through the model; sums and counts under names of their own. Steps of a critic
    are averaged."""
    totals = _merged(steps)
    num_tokens = max(1.0, totals["forward_tokens"])
    found = spreads(totals)
    found |= {
        name: value / num_tokens for name, value in totals.items() if name.startswith(("actor/", "rollout_corr/"))
    }
    found |= {name: value / len(steps) for name, value in totals.items() if name.startswith("critic/")}
    mean = totals["probs_diff"] / num_tokens
    variance = max(0.0, totals["probs_diff_square"] / num_tokens - mean * mean)
    return found | {
        "training/rollout_probs_diff_mean": mean,
        "training/rollout_probs_diff_std": math.sqrt(variance),
        "training/rollout_probs_diff_max": totals["training/rollout_probs_diff_max"],
        "training/num_tokens": totals["tokens"],
        "training/num_rows": totals["rows"],
        "training/num_forward_tokens": totals["forward_tokens"],
        "training/num_flops": totals["flops"],
    }


def _merged(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """Totals of several steps as of one."""
    merged = dict(steps[0])
    for step in steps[1:]:
        for name, value in step.items():
            merged[name] = max(merged[name], value) if name.endswith(_MAXIMA) else merged[name] + value
    return merged
