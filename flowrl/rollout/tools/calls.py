"""Finds tool calls in what the model wrote: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, any number of them.

A parser of the user's (`rollout.tool_parser`) is a function from text to a list of `ToolCall` and `Unreadable`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(re.escape(OPEN) + r"(.*?)(" + re.escape(CLOSE) + r"|\Z)", re.DOTALL)


@dataclass(frozen=True)
class ToolCall:
    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """A call that cannot be made; the model is told why."""

    reason: str


def parse_calls(text: str) -> list[ToolCall | Unreadable]:
    """In the order in which they stand; none where the model called nothing."""
    return [_parse(match.group(1), bool(match.group(2))) for match in _CALL.finditer(text)]


def _parse(body: str, is_closed: bool) -> ToolCall | Unreadable:
    if not is_closed:
        return Unreadable(f"a call must end with {CLOSE}")
    try:
        call = msgspec.json.decode(body.strip())
    except msgspec.DecodeError as error:
        return Unreadable(f"a call must be JSON: {error}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return Unreadable('a call must be an object with "name" and "arguments"')
    arguments = call.get("arguments", {})
    if not isinstance(arguments, dict):
        return Unreadable('"arguments" must be an object')
    return ToolCall(call["name"], arguments)
