"""From the names in a recipe to tools."""

from __future__ import annotations

import inspect
from typing import Any

from controllers.dotted import load_attribute
from flowrl.config.rollout import RolloutConfig
from flowrl.rollout.failure import EpisodeFailed
from flowrl.rollout.tools.calculator import calculate
from flowrl.rollout.tools.tool import Tool
from flowrl.sandbox.report import describe
from flowrl.sandbox.sandbox import Sandbox, SandboxUnavailable


def load_tools(rollout: RolloutConfig, sandbox: Sandbox) -> list[Tool]:
    """sandbox: what `python` runs in. Raises ValueError naming the path and the rule."""
    tools = [_load(name, rollout, sandbox) for name in rollout.tools]
    names = [tool.name for tool in tools]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"rollout.tools: {rollout.tools}; two are called {name!r}")
    return tools


def _load(name: str, rollout: RolloutConfig, sandbox: Sandbox) -> Tool:
    if name == "calculator":
        return Tool(
            name="calculator",
            description="Computes an arithmetic expression.",
            parameters=_one_string("expression", "For example (3 + 4) * 1.5"),
            function=calculate,
            timeout_s=None,
        )
    if name == "python":
        return Tool(
            name="python",
            description="Runs a Python program and returns what it prints.",
            parameters=_one_string("code", "The program; only what it prints comes back"),
            function=PythonTool(sandbox),
            timeout_s=None,  # the sandbox limits it, and its own queue must not count
        )
    return _own(name, rollout.tool_timeout_s)


class PythonTool:
    """Raises EpisodeFailed where the sandbox is there no longer: the model could do nothing about it."""

    def __init__(self, sandbox: Sandbox) -> None:
        self.sandbox = sandbox

    async def __call__(self, code: str) -> str:
        if not isinstance(code, str):
            raise ValueError("code: must be a string")
        try:
            return describe(await self.sandbox.run(code))
        except SandboxUnavailable as error:
            raise EpisodeFailed("sandbox_unavailable", str(error)) from error


def _own(path: str, timeout_s: float) -> Tool:
    """A function of the user's: its schema comes from its type hints and its docstring."""
    from transformers.utils import get_json_schema
    from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException

    function = load_attribute(path)
    if isinstance(function, Tool):
        return function
    if not inspect.isfunction(function):
        raise ValueError(f"rollout.tools: {path!r}; is a {type(function).__name__}, must be a function or a Tool")
    try:
        about: dict[str, Any] = get_json_schema(function)["function"]
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(f"rollout.tools: {path!r}; needs type hints and a docstring with 'Args:': {error}") from error
    return Tool(
        name=about["name"],
        description=about["description"],
        parameters=about["parameters"],
        function=function,
        timeout_s=timeout_s,
    )


def _one_string(name: str, description: str) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {name: {"type": "string", "description": description}},
        "required": [name],
    }
