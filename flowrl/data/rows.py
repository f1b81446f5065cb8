"""From one raw row (a mapping of columns) to an `Example`. Knows the field's columns, not the file they came from.

prompt         string or messages; or question, or problem
ground truth   reward_model.ground_truth; or exactly one of ground_truth, answer, solution
the rest       data_source, extra_info, demonstration: optional
GSM8K          question, and an answer with `#### n`: its own `Layout`, chosen from the first row
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

from flowrl.data.example import Example, Prompt

PROMPT_COLUMNS = ("prompt", "question", "problem")
TRUTH_COLUMNS = ("ground_truth", "answer", "solution")
GSM8K_MARK = "####"


class Layout(enum.Enum):
    FIELD = "field"
    GSM8K = "gsm8k"


def layout_of(row: Mapping[str, Any]) -> Layout:
    """GSM8K as published has these two columns, and its mark in the answer."""
    answer = row.get("answer")
    if set(row) == {"question", "answer"} and isinstance(answer, str) and GSM8K_MARK in answer:
        return Layout.GSM8K
    return Layout.FIELD


def to_example(row: Mapping[str, Any], layout: Layout, index: int, origin: str, default_source: str) -> Example:
    """Raises ValueError naming `origin`, field, value and rule."""
    if layout is Layout.GSM8K:
        return _gsm8k_example(row, index, origin)
    prompt = _prompt(row, origin)
    extra_info = row.get("extra_info")
    if extra_info is None:
        extra_info = {}
    if not isinstance(extra_info, Mapping):
        raise _refusal(origin, "extra_info", extra_info, "must be a mapping")
    data_source = row.get("data_source")
    if not isinstance(data_source, str | None):
        raise _refusal(origin, "data_source", data_source, "must be a string")
    demonstration = row.get("demonstration")
    if not isinstance(demonstration, str | None):
        raise _refusal(origin, "demonstration", demonstration, "must be a string")
    truth = _ground_truth(row, origin)
    return Example(
        index=index,
        prompt=prompt,
        data_source=default_source if data_source is None else data_source,
        ground_truth=truth,
        extra_info=extra_info,
        demonstration=truth if demonstration is None and isinstance(truth, str) else demonstration,
        origin=origin,
    )


def _gsm8k_example(row: Mapping[str, Any], index: int, origin: str) -> Example:
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not question:
        raise _refusal(origin, "question", question, "must be a string that is not empty")
    if not isinstance(answer, str) or GSM8K_MARK not in answer:
        raise _refusal(origin, "answer", answer, "must end with '#### ' and the number, as in the rows before")
    truth = answer.rpartition(GSM8K_MARK)[2].strip().replace(",", "")
    if not truth:
        raise _refusal(origin, "answer", answer, "must have a number after '####'")
    return Example(
        index=index,
        prompt=question,
        data_source="openai/gsm8k",
        ground_truth=truth,
        demonstration=answer,
        origin=origin,
    )


def _prompt(row: Mapping[str, Any], origin: str) -> Prompt:
    present = [name for name in PROMPT_COLUMNS if row.get(name) is not None]
    if not present:
        raise _refusal(origin, "prompt", None, f"must be there (columns found: {', '.join(row) or 'none'})")
    name = present[0]
    prompt = row[name]
    if isinstance(prompt, str) and prompt:
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise _refusal(origin, name, prompt, "must be a string or a list of messages, and not empty")
    for message in prompt:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise _refusal(origin, name, message, "a message has the strings 'role' and 'content'")
    return [{"role": message["role"], "content": message["content"]} for message in prompt]


def _ground_truth(row: Mapping[str, Any], origin: str) -> Any:
    reward_model = row.get("reward_model")
    if isinstance(reward_model, Mapping) and reward_model.get("ground_truth") is not None:
        return reward_model["ground_truth"]
    present = [name for name in TRUTH_COLUMNS if row.get(name) is not None]
    if len(present) > 1:
        raise _refusal(origin, "ground_truth", present, "ambiguous; give reward_model.ground_truth, or one of them")
    return row[present[0]] if present else None


def _refusal(origin: str, field: str, value: Any, rule: str) -> ValueError:
    shown = repr(value)
    return ValueError(f"{origin}: {field}: {shown if len(shown) <= 80 else shown[:77] + '...'}; {rule}")
