"""A reward that an untrained model already gets some of, so that tests have gradients without a warm start."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: Any, extra_info: Any = None) -> float:
    """The share of vowels."""
    return sum(letter in "aeiou" for letter in solution_str) / max(1, len(solution_str))
