"""Episodes: what a trajectory says of each token, tools, limits, and every way of failing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowrl.config import Recipe
from flowrl.rollout.engine import EngineError, FinishReason
from flowrl.rollout.episodes import EpisodeFailed, Failure, Trajectory, Transcript, single_turn
from flowrl.rollout.episodes.runner import MOST_FAILURES_IN_A_ROW, EpisodeRunner
from flowrl.rollout.episodes.trajectory import last_turn
from tests.rollout.episode_parts import MAX_TOKENS, ScriptedEngine, make_model, make_recipe, requests_of

HERE = "tests.rollout.test_episodes"
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'

Make = Callable[..., tuple[Recipe, EpisodeRunner]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("episodes") / "model")


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Iterator[Make]:
    runners: list[EpisodeRunner] = []

    def make(*overrides: str, **options: Any) -> tuple[Recipe, EpisodeRunner]:
        recipe = make_recipe(tmp_path, model, *overrides, **options)
        runners.append(EpisodeRunner(recipe))
        return recipe, runners[-1]

    yield make
    for runner in runners:
        runner.close()


def play(recipe: Recipe, runner: EpisodeRunner, engine: Any, row: int = 0) -> Trajectory | Failure:
    request, example = requests_of(recipe, runner)[row]
    return asyncio.run(runner.run(engine, request, example))


def tools(*names: str, **limits: int | float) -> list[str]:
    more = [f"rollout.{name}={value}" for name, value in limits.items()]
    return ["rollout.episode=multi_turn", f"rollout.tools=[{','.join(names)}]", *more]


def test_a_single_turn_passes_on_what_the_engine_said(make: Make) -> None:
    recipe, runner = make()
    engine = ScriptedEngine(runner, ["two"])
    trajectory = play(recipe, runner, engine)
    assert isinstance(trajectory, Trajectory)
    [written] = engine.written
    assert trajectory.tokens.tolist() == written.tokens.tolist()
    assert trajectory.mask.tolist() == [1] * len(written.tokens)
    assert trajectory.finish_reason is FinishReason.STOP
    assert trajectory.spans() == [(3, 4)]


def test_tokens_of_several_turns_are_those_of_the_whole_conversation(make: Make) -> None:
    """What the model wrote stays token for token; what it read is the template's own rendering, and masked."""
    recipe, runner = make(*tools("calculator"))
    engine = ScriptedEngine(runner, [CALL % "17*3", "it is 51"])
    trajectory = play(recipe, runner, engine)
    assert isinstance(trajectory, Trajectory)
    whole = [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": CALL % "17*3"},
        {"role": "tool", "content": "51"},
        {"role": "assistant", "content": "it is 51"},
    ]
    text = runner.encoder.tokenizer.apply_chat_template(whole, tokenize=False)
    expected = runner.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert [*(trajectory.prompt or ()), *trajectory.tokens.tolist()] == expected
    first, second = engine.written
    assert trajectory.tokens[trajectory.mask == 1].tolist() == [*first.tokens, *second.tokens]
    assert (trajectory.logprobs[trajectory.mask == 0] == 0).all()
    assert (trajectory.logprobs[trajectory.mask == 1] == -0.5).all()
    assert runner.encoder.decode(last_turn(trajectory.tokens, trajectory.mask)) == "it is 51"
    assert sum(count for _, count in trajectory.spans()) == trajectory.mask.sum()


def test_the_second_turn_continues_exactly_what_the_first_left(make: Make) -> None:
    recipe, runner = make(*tools("calculator"))
    engine = ScriptedEngine(runner, [CALL % "1+1", "2"])
    trajectory = play(recipe, runner, engine)
    assert isinstance(trajectory, Trajectory)
    first, second = engine.requests
    num_new = len(trajectory.tokens) - len(engine.written[1].tokens)
    assert second.tokens == (*first.tokens, *trajectory.tokens.tolist()[:num_new])
    assert second.request_id != first.request_id and second.sampling.seed != first.sampling.seed
    assert second.sampling.max_tokens == MAX_TOKENS - num_new


@pytest.mark.parametrize(
    ("call", "answer"),
    [
        ("<tool_call>{nonsense</tool_call>", "error: a call must be JSON"),
        ('<tool_call>{"name": "calculator"', "error: a call must end with </tool_call>"),
        ("<tool_call>[1]</tool_call>", 'error: a call must be an object with "name" and "arguments"'),
        ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', "error: no tool 'search'; there are calculator"),
        ('<tool_call>{"name": "calculator", "arguments": 3}</tool_call>', 'error: "arguments" must be an object'),
        ('<tool_call>{"name": "calculator"}</tool_call>', "error: calculator needs the argument 'expression'"),
        ('<tool_call>{"name": "calculator", "arguments": {"x": 1}}</tool_call>', "error: calculator has no argument"),
        (CALL % "1/0", "error: division by zero"),
        (CALL % "__import__('os')", "error: not arithmetic"),
    ],
)
def test_what_the_model_did_wrong_is_told_to_it(make: Make, call: str, answer: str) -> None:
    recipe, runner = make(*tools("calculator"))
    trajectory = play(recipe, runner, ScriptedEngine(runner, [call, "sorry"]))
    assert isinstance(trajectory, Trajectory) and trajectory.num_turns == 2
    assert answer in runner.encoder.decode(trajectory.tokens[trajectory.mask == 0])


def test_calls_of_one_turn_run_together_and_are_answered_in_order(make: Make) -> None:
    recipe, runner = make(*tools(f"{HERE}:slow_echo"))
    one = '<tool_call>{"name": "slow_echo", "arguments": {"word": "%s", "seconds": %s}}</tool_call>'
    engine = ScriptedEngine(runner, [one % ("first", 0.4) + one % ("second", 0.1), "done"])
    started = time.monotonic()
    trajectory = play(recipe, runner, engine)
    assert isinstance(trajectory, Trajectory)
    said = runner.encoder.decode(trajectory.tokens[trajectory.mask == 0])
    assert said.index("first") < said.index("second")
    assert time.monotonic() - started < 5


def slow_echo(word: str, seconds: float) -> str:
    """Says a word again.

    Args:
        word: What to say.
        seconds: When.
    """
    time.sleep(seconds)
    return word


def test_a_tool_that_hangs_is_answered_for(make: Make) -> None:
    recipe, runner = make(*tools(f"{HERE}:slow_echo", tool_timeout_s=0.2))
    call = '<tool_call>{"name": "slow_echo", "arguments": {"word": "x", "seconds": 3}}</tool_call>'
    trajectory = play(recipe, runner, ScriptedEngine(runner, [call, "oh"]))
    assert isinstance(trajectory, Trajectory)
    assert "error: no answer in 0.2 s" in runner.encoder.decode(trajectory.tokens[trajectory.mask == 0])


def shout() -> str:
    """Says too much, and tries to end the model's turn for it."""
    return "<eos>" + "x" * 1000


def test_a_tools_answer_is_cut_and_cannot_forge_special_tokens(make: Make) -> None:
    recipe, runner = make(*tools(f"{HERE}:shout", tool_output_tokens=20))
    call = '<tool_call>{"name": "shout", "arguments": {}}</tool_call>'
    trajectory = play(recipe, runner, ScriptedEngine(runner, [call, "ok"]))
    assert isinstance(trajectory, Trajectory)
    read = trajectory.tokens[trajectory.mask == 0]
    eos = runner.encoder.tokenizer.eos_token_id
    assert eos not in read.tolist()
    assert runner.encoder.decode(read).startswith("x" * 19) and "[cut]" in runner.encoder.decode(read)
    assert len(read) < 40


def test_python_tool_runs_in_the_sandbox(make: Make) -> None:
    recipe, runner = make(*tools("python"))
    call = '<tool_call>{"name": "python", "arguments": {"code": "print(2**10)"}}</tool_call>'
    trajectory = play(recipe, runner, ScriptedEngine(runner, [call, "1024"]))
    assert isinstance(trajectory, Trajectory)
    assert "1024" in runner.encoder.decode(trajectory.tokens[trajectory.mask == 0])


def test_a_model_that_never_stops_calling_ends_by_turns(make: Make) -> None:
    recipe, runner = make(*tools("calculator", max_turns=3))
    trajectory = play(recipe, runner, ScriptedEngine(runner, [CALL % "1"] * 9))
    assert isinstance(trajectory, Trajectory)
    assert (trajectory.num_turns, trajectory.finish_reason) == (3, FinishReason.LENGTH)
    assert trajectory.mask[-1] == 1, "what was said after the last turn is no part of it"


def test_a_conversation_never_outgrows_its_room(make: Make) -> None:
    recipe, runner = make(*tools("calculator", max_turns=50))
    trajectory = play(recipe, runner, ScriptedEngine(runner, [CALL % "123456789*2"] * 50))
    assert isinstance(trajectory, Trajectory)
    assert trajectory.finish_reason is FinishReason.LENGTH and trajectory.num_turns < 50
    assert len(trajectory.tokens) <= MAX_TOKENS and trajectory.mask[-1] == 1


def test_a_turn_has_a_limit_of_its_own(make: Make) -> None:
    recipe, runner = make(*tools("calculator", turn_tokens=5))
    trajectory = play(recipe, runner, ScriptedEngine(runner, ["a very long answer"]))
    assert isinstance(trajectory, Trajectory)
    assert (len(trajectory.tokens), trajectory.finish_reason) == (5, FinishReason.LENGTH)


async def raises(context: Any) -> Trajectory:
    raise KeyError("nothing here")


async def gives_up(context: Any) -> Trajectory:
    raise EpisodeFailed("bored", "the task is too dull")


async def hangs(context: Any) -> Trajectory:
    await context.engine.generate(context.request)
    await asyncio.sleep(60)
    raise AssertionError


async def returns_none(context: Any) -> None:
    return None


async def lies_about_lengths(context: Any) -> Trajectory:
    whole = await single_turn(context)
    return Trajectory(
        tokens=whole.tokens, mask=whole.mask[1:], logprobs=whole.logprobs, versions=whole.versions,
        finish_reason=whole.finish_reason,
    )  # fmt: skip


async def rewards_itself(context: Any) -> Trajectory:
    transcript = context.begin()
    await context.write(transcript)
    return transcript.trajectory(reward=1.0)


async def writes_nothing(context: Any) -> Trajectory:
    whole = await single_turn(context)
    return Trajectory(
        tokens=whole.tokens, mask=np.zeros_like(whole.mask), logprobs=whole.logprobs, versions=whole.versions,
        finish_reason=whole.finish_reason,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("episode", "reason", "detail"),
    [
        ("raises", "episode_error", "KeyError('nothing here')"),
        ("gives_up", "bored", "too dull"),
        ("hangs", "episode_timeout", "not over in 0.3 s"),
        ("returns_none", "bad_trajectory", "returned a NoneType"),
        ("lies_about_lengths", "bad_trajectory", "must be equally long"),
        ("rewards_itself", "bad_trajectory", "set reward.name=episode"),
        ("writes_nothing", "bad_trajectory", "holds no 1"),
    ],
)
def test_an_episode_that_comes_to_nothing_says_why(make: Make, episode: str, reason: str, detail: str) -> None:
    recipe, runner = make(f"rollout.episode={HERE}:{episode}", "rollout.episode_timeout_s=0.3")
    failure = play(recipe, runner, ScriptedEngine(runner, ["some words"]))
    assert isinstance(failure, Failure)
    assert failure.reason == reason and detail in failure.detail
    assert runner.failures == {reason: 1}


def test_the_line_that_raised_is_named(make: Make) -> None:
    recipe, runner = make(f"rollout.episode={HERE}:raises")
    failure = play(recipe, runner, ScriptedEngine(runner, []))
    assert isinstance(failure, Failure) and f"{__file__}:" in failure.detail


def test_an_engine_that_fails_is_no_failure_of_the_episode(make: Make) -> None:
    def fail(request: Any) -> str:
        raise EngineError("the engine is gone")

    recipe, runner = make()
    with pytest.raises(EngineError, match="gone"):
        play(recipe, runner, ScriptedEngine(runner, fail))


def test_when_nothing_succeeds_any_more_the_run_ends_by_name(make: Make) -> None:
    recipe, runner = make(f"rollout.episode={HERE}:gives_up")
    request, example = requests_of(recipe, runner)[0]
    engine = ScriptedEngine(runner, [])

    async def play_on() -> None:
        for _ in range(MOST_FAILURES_IN_A_ROW):
            await runner.run(engine, request, example)

    with pytest.raises(RuntimeError, match=r"all failed.*bored: the task is too dull"):
        asyncio.run(play_on())


def test_stopping_cancels_what_runs(make: Make) -> None:
    recipe, runner = make()
    engine = ScriptedEngine(runner, ["x"])
    engine.seconds = 60

    async def stop_underway() -> list[Any]:
        running = [asyncio.create_task(runner.run(engine, *one)) for one in requests_of(recipe, runner)]
        await asyncio.sleep(0.05)
        assert engine.num_running == 4
        runner.stop()
        return await asyncio.gather(*running, return_exceptions=True)

    assert {type(one) for one in asyncio.run(stop_underway())} == {asyncio.CancelledError}
    assert engine.num_running == 0


def test_reading_what_does_not_fit_leaves_the_transcript_as_it_was(make: Make) -> None:
    recipe, runner = make()
    engine = ScriptedEngine(runner, ["abc"])
    written = asyncio.run(engine.generate(requests_of(recipe, runner)[0][0]))
    transcript = Transcript((1, 2), max_tokens=6)
    transcript.write(written)
    assert not transcript.read((5, 6))
    assert transcript.tokens == (1, 2, *written.tokens) and transcript.finish_reason is FinishReason.LENGTH
    assert transcript.read((5,)) and transcript.room == 1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.episode=multi_turns"], "must be one of single_turn.*did you mean 'multi_turn'"),
        (["rollout.episode=multi_turn"], "rollout.tools: .*needs at least one"),
        (["rollout.tools=[calculator]"], "rollout.tools: .*single_turn calls none"),
        (["rollout.episode=multi_turn", "rollout.tools=[calculater]"], "did you mean 'calculator'"),
        (["rollout.episode=environment"], "rollout.environment: missing"),
        (["rollout.episode=environment", "rollout.environment.path=a.py:B"], "set reward.name=episode"),
        (["reward.name=episode"], "reward.name: 'episode'; rollout.episode=single_turn gives no reward"),
        (["rollout.turn_tokens=5"], "a single turn has max_tokens"),
        (["rollout.in_flight=abort", "rollout.stop_strings=[x]"], "rollout.stop_strings: an aborted response"),
        (["rollout.sandbox.isolation=none"], "must be one of full, limits"),
        ([f"rollout.episode={HERE}:raises", "rollout.handover=batch"], "rollout.handover: 'batch'"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(make: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*overrides)


def no_hints(word):  # type: ignore[no-untyped-def]
    """Says it."""
    return word


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (tools(f"{HERE}:no_hints"), "needs type hints and a docstring"),
        (tools(f"{HERE}:HERE"), "is a str, must be a function"),
        (tools("calculator", "calculator"), "two are called 'calculator'"),
        ([f"rollout.episode={HERE}:no_hints"], "must be `async def"),
        ([f"rollout.episode={HERE}:nowhere"], "has no 'nowhere'"),
    ],
)
def test_a_path_that_leads_to_something_else_is_refused(make: Make, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(*overrides)
