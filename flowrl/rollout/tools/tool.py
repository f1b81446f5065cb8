"""What a tool is, and how one is called: whatever goes wrong becomes text that the model reads."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from flowrl.data.example import Message
from flowrl.rollout.tools.calls import ToolCall, Unreadable
from flowrl.rollout.user_code import CallFailed, CallTimedOut, UserCode


@dataclass(frozen=True, kw_only=True)
class Tool:
    """function: takes the arguments by name, returns text or anything that JSON can say; a coroutine or an ordinary
    function. parameters: their JSON schema. timeout_s: None for one of ours that is quick or limits itself: it is
    called in the rollout loop, where everything else waits for it."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    timeout_s: float | None

    @property
    def schema(self) -> dict[str, Any]:
        """As chat templates take it."""
        about = {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}
        return {"type": "function", "function": about}


class Toolbox:
    """The tools of a recipe, by name."""

    def __init__(self, tools: Iterable[Tool], user_code: UserCode) -> None:
        self.tools = {tool.name: tool for tool in tools}
        self.user_code = user_code

    @property
    def schemas(self) -> list[dict[str, Any]]:
        return [tool.schema for tool in self.tools.values()]

    async def answer(self, call: ToolCall | Unreadable) -> Message:
        """The tool's message. Never raises for what the model or the tool did wrong: it is told."""
        if isinstance(call, Unreadable):
            return {"role": "tool", "name": "", "content": f"error: {call.reason}"}
        return {"role": "tool", "name": call.name, "content": await self._content(call)}

    async def _content(self, call: ToolCall) -> str:
        tool = self.tools.get(call.name)
        if tool is None:
            return f"error: no tool {call.name!r}; there are {', '.join(self.tools)}"
        refusal = _refusal(tool, call.arguments)
        if refusal:
            return f"error: {refusal}"
        try:
            result = await self._result(tool, call.arguments)
        except CallTimedOut:
            return f"error: no answer in {tool.timeout_s:g} s"
        except CallFailed as error:
            return f"error: {error.__cause__}"
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False, default=str)

    async def _result(self, tool: Tool, arguments: Mapping[str, Any]) -> Any:
        if tool.timeout_s is not None:
            by_name = functools.partial(tool.function, **arguments)
            return await self.user_code.call(f"tool {tool.name}", by_name, timeout_s=tool.timeout_s)
        try:
            result = tool.function(**arguments)
            return await result if inspect.isawaitable(result) else result
        except (ValueError, TypeError) as error:
            raise CallFailed(f"tool {tool.name}: {error}") from error


def _refusal(tool: Tool, arguments: Mapping[str, Any]) -> str:
    known = tool.parameters.get("properties", {})
    unknown = [name for name in arguments if name not in known]
    missing = [name for name in tool.parameters.get("required", ()) if name not in arguments]
    if unknown:
        return f"{tool.name} has no argument {unknown[0]!r}; it takes {', '.join(known) or 'none'}"
    return f"{tool.name} needs the argument {missing[0]!r}" if missing else ""
