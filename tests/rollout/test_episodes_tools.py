"""The calculator, the parser of calls, and what answers a reply gets from chat templates of several kinds."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowrl.config.episodes import SandboxConfig
from flowrl.config.rollout import RolloutConfig
from flowrl.data.prompts import PromptEncoder
from flowrl.rollout.failure import EpisodeFailed
from flowrl.rollout.tools.calculator import calculate
from flowrl.rollout.tools.calls import ToolCall, Unreadable, parse_calls
from flowrl.rollout.tools.registry import load_tools
from flowrl.rollout.tools.tool import Toolbox
from flowrl.rollout.user_code import UserCode
from flowrl.sandbox.sandbox import Sandbox, SandboxUnavailable
from tests.rollout.episode_parts import make_model

CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
STRICT = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)


@settings(deadline=None)
@given(st.integers(-(10**9), 10**9), st.integers(-(10**9), 10**9), st.sampled_from(["+", "-", "*", "//", "%"]))
def test_whole_numbers_are_computed_exactly(left: int, right: int, sign: str) -> None:
    if right == 0 and sign in ("//", "%"):
        return
    assert calculate(f"({left}) {sign} ({right})") == str(eval(f"({left}) {sign} ({right})"))


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2^10", "1024"), ("1/4", "0.25"), ("6/3", "2"), ("sqrt(2)", f"{math.sqrt(2):.12g}"), ("-(3 - 5)", "2"),
     ("round(3.14159, 2)", "3.14"), ("max(1, 2, 3) + pi * 0", "3"), ("1e3 + 1", "1001"), ("7 % 4", "3")],
)  # fmt: skip
def test_arithmetic_is_what_it_should_be(expression: str, value: str) -> None:
    assert calculate(expression) == value


@pytest.mark.parametrize(
    "expression",
    ["9**9**9**9", "2**100000", "10**10**10", "round(5, -10**9)", "round(1, 10**9)", "(-8)**0.5", "1e308*10", "()",
     "1+", "'a'*10**9", "[1]*9", "x", "abs", "abs(1, 2)", "sqrt(-1)", "min(*[1])", "max(1, key=2)", "(1).real", "True",
     "1 if 1 else 2", "(lambda: 1)()", "__import__('os')", "1;2", "(" * 200, "-" * 300 + "1", "1" * 600, "exp(1000)",
     "log(0)", "1//0"],
)  # fmt: skip
def test_what_is_no_arithmetic_or_too_large_is_refused_at_once(expression: str) -> None:
    started = time.monotonic()
    with pytest.raises(ValueError):
        calculate(expression)
    assert time.monotonic() - started < 5


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="0123456789+-*/%^().,e absqrtlogx'[]", max_size=60))
def test_whatever_the_model_writes_the_calculator_answers(text: str) -> None:
    try:
        assert calculate(text)
    except ValueError as error:
        assert str(error)


def test_a_sandbox_that_fails_ends_the_episode_and_is_not_told_to_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = Sandbox(SandboxConfig())
    try:
        sandbox.check()
    except SandboxUnavailable as error:
        pytest.skip(f"no isolation here: {error}")
    (python,) = load_tools(RolloutConfig(episode="multi_turn", tools=["python"]), sandbox)
    call = ToolCall(name="python", arguments={"code": "print(6 * 7)"})
    toolbox = Toolbox([python], UserCode())
    try:
        assert asyncio.run(toolbox.answer(call))["content"].strip() == "42"
        monkeypatch.setattr(sys, "executable", "/bin/false")  # as if the interpreter had been replaced
        with pytest.raises(EpisodeFailed) as failed:
            asyncio.run(toolbox.answer(call))
        assert failed.value.failure.reason == "sandbox_unavailable"
    finally:
        toolbox.user_code.close()
        sandbox.close()


def test_calls_are_found_in_their_order_and_the_rest_is_no_call() -> None:
    text = 'a <tool_call>{"name": "f", "arguments": {"x": [1]}}</tool_call> b <tool_call>\n{"name": "g"}\n</tool_call>c'
    assert parse_calls(text) == [ToolCall("f", {"x": [1]}), ToolCall("g", {})]
    assert parse_calls("nothing here") == []


@settings(deadline=None)
@given(st.text(max_size=40))
def test_any_text_in_a_call_is_a_call_or_is_unreadable(text: str) -> None:
    found = parse_calls(f"<tool_call>{text}</tool_call>")
    assert found and all(isinstance(one, ToolCall | Unreadable) for one in found)


@pytest.fixture
def encoder(tmp_path: Path) -> PromptEncoder:
    return PromptEncoder(make_model(tmp_path / "model"), 512)


def test_a_reply_continues_what_the_template_would_have_written(encoder: PromptEncoder) -> None:
    """Where the model ended its turn the template goes on behind the very same token, which is not said twice."""
    encoder.tokenizer.chat_template = CHATML
    response = encoder.encode_response("hello")
    reply = encoder.encode_reply([{"role": "tool", "content": "42"}, {"role": "tool", "content": "43"}], response[-1])
    text = encoder.tokenizer.decode([*response, *reply], skip_special_tokens=False)
    assert text == "hello<eos>\n<|tool|>\n42<eos>\n<|tool|>\n43<eos>\n<|assistant|>\n"
    cut = encoder.encode_reply([{"role": "user", "content": "go on"}], response[0])
    assert encoder.tokenizer.decode(cut, skip_special_tokens=False) == "<eos>\n<|user|>\ngo on<eos>\n<|assistant|>\n"


def test_a_template_that_knows_no_tools_is_named(encoder: PromptEncoder) -> None:
    encoder.tokenizer.chat_template = STRICT
    with pytest.raises(
        ValueError, match=r"model\.path: its chat template refuses messages of role tool: no tools here"
    ):
        encoder.encode_reply([{"role": "tool", "content": "42"}], 0)


def test_tools_are_shown_to_the_model_in_every_prompt(tmp_path: Path) -> None:
    template = "{% for tool in tools %}[{{ tool.function.name }}]{% endfor %}{{ messages[0]['content'] }}"
    encoder = PromptEncoder(make_model(tmp_path / "model"), 512, [{"type": "function", "function": {"name": "look"}}])
    encoder.tokenizer.chat_template = template
    assert encoder.decode(encoder.encode("hi")) == "[look]hi"
