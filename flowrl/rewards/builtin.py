"""Rewards that a recipe calls by name. Each takes the row and the response, and gives 1.0 for a right answer."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from typing import Any

from flowrl.data.gym import open_task

_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_MARKED = re.compile(r"####\s*\$?\s*(-?[\d,]*\.?\d+)")


def exact_match(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the response, without the white space around it, is the ground truth."""
    return float(solution_str.strip() == str(ground_truth).strip())


def gsm8k(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the number after the last `####` equals the ground truth; in a response without such a mark the last
    number counts. Numbers are compared as numbers: 1,000 is 1000.0."""
    marked = _MARKED.findall(solution_str)
    found = marked or _NUMBER.findall(solution_str)
    return float(bool(found) and _number(found[-1]) == _number(str(ground_truth)))


def reasoning_gym(
    data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]
) -> dict[str, float]:
    """The task's own score, which may be partial; `acc` is 1.0 for a full one. extra_info: task, options, seed, size
    and item, as `flowrl/data/gym.py` writes them."""
    missing = {"task", "options", "seed", "size", "item"} - set(extra_info)
    if missing:
        raise ValueError(
            f"extra_info: lacks {', '.join(sorted(missing))}; the reward reasoning_gym needs data.source=reasoning_gym"
        )
    options = json.dumps(extra_info["options"], sort_keys=True)
    task = _task(extra_info["task"], options, extra_info["size"], extra_info["seed"])
    score = float(task.score_answer(solution_str.strip(), entry=_entry(task, extra_info["item"])))
    return {"score": score, "acc": float(score >= 1.0)}


def reasoning_gym_exact(data_source: str, solution_str: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the task's own verifier gives the response full marks, otherwise 0: no partial credit."""
    return reasoning_gym(data_source, solution_str, ground_truth, extra_info)["acc"]


@functools.cache
def _task(name: str, options: str, size: int, seed: int) -> Any:
    return open_task(name, json.loads(options), size, seed)


@functools.lru_cache(maxsize=4096)
def _entry(task: Any, item: int) -> Mapping[str, Any]:
    """Drawn again rather than carried along: some verifiers need tuples and arrays that no file keeps."""
    return task[item]


def _number(text: str) -> float | str:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return text


BUILTIN = {
    "exact_match": exact_match,
    "gsm8k": gsm8k,
    "reasoning_gym": reasoning_gym,
    "reasoning_gym_exact": reasoning_gym_exact,
}
