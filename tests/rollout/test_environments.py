"""Environments of the user's: played to their end, and kept from holding up anything when they misbehave."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flowrl.config import Recipe
from flowrl.rollout import user_code
from flowrl.rollout.engine import FinishReason
from flowrl.rollout.episodes import Failure, Trajectory
from flowrl.rollout.episodes.runner import EpisodeRunner
from flowrl.rollout.user_code import CallFailed, CallTimedOut, UserCode
from tests.rollout.episode_parts import ScriptedEngine, make_model, make_recipe, requests_of

HERE = "tests.rollout.test_environments"
Make = Callable[..., tuple[Recipe, EpisodeRunner]]
Outcome = Trajectory | Failure


class Guessing:
    """Guess a number; warmer earns a little."""

    closed = 0

    def __init__(self, secret: int = 7) -> None:
        self.secret = secret

    async def reset(self, example: Any) -> str:
        return f"guess! ({example.prompt})"

    async def step(self, text: str) -> tuple[str, float, bool]:
        guess = int(text)
        await asyncio.sleep(0)
        return (
            ("higher" if guess < self.secret else "lower"),
            0.25 if guess != self.secret else 1.0,
            guess == self.secret,
        )

    async def close(self) -> None:
        Guessing.closed += 1


class PlainGuessing:
    """The same, without a coroutine in it."""

    def __init__(self, secret: int = 7) -> None:
        self.secret = secret

    def reset(self, example: Any) -> list[dict[str, str]]:
        return [{"role": "user", "content": f"guess! ({example.prompt})"}]

    def step(self, text: str) -> tuple[str, float, bool]:
        guess = int(text)
        return (
            ("higher" if guess < self.secret else "lower"),
            0.25 if guess != self.secret else 1.0,
            guess == self.secret,
        )


class Misbehaving:
    """Does what its row says: rows 1+1=, 2+2=, … each have a way of their own to go wrong."""

    def __init__(self, ways: list[str]) -> None:
        self.ways = ways
        self.way = ""

    async def reset(self, example: Any) -> None:
        self.way = self.ways[example.index]
        if self.way == "crash at reset":
            raise OSError("no such game")

    async def step(self, text: str) -> Any:
        match self.way:
            case "well":
                return "go on", 1.0, text == "b"
            case "slow":
                await asyncio.sleep(0.5)
                return "", 1.0, True
            case "hang":
                await asyncio.sleep(60)
            case "crash":
                raise ZeroDivisionError("the game broke")
            case "exit":
                raise SystemExit(3)
            case "garbage":
                return "only an observation"
            case "bad reward":
                return "", float("nan"), False
            case "bad done":
                return "", 0.0, "yes"
            case "bad observation":
                return 42, 0.0, False
            case "block the loop":
                time.sleep(4)
        return "", 0.0, True


class PlainMisbehaving:
    """The same in ordinary functions, each in a thread of its own."""

    def __init__(self, ways: list[str]) -> None:
        self.inner = Misbehaving(ways)

    def reset(self, example: Any) -> None:
        self.inner.way = self.inner.ways[example.index]

    def step(self, text: str) -> Any:
        if self.inner.way == "hang":
            time.sleep(4)
        return asyncio.run(self.inner.step(text))


WAYS = [
    "well",
    "slow",
    "hang",
    "crash at reset",
    "crash",
    "exit",
    "garbage",
    "bad reward",
    "bad done",
    "bad observation",
]
REASONS = {
    "hang": "environment_timeout", "crash at reset": "environment_error", "crash": "environment_error",
    "exit": "environment_error", "garbage": "environment_garbage", "bad reward": "environment_garbage",
    "bad done": "environment_garbage", "bad observation": "environment_garbage",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("environments") / "model")


@pytest.fixture
def make(tmp_path: Path, model: Path) -> Iterator[Make]:
    runners: list[EpisodeRunner] = []

    def make(name: str, *overrides: str, num_rows: int = 1) -> tuple[Recipe, EpisodeRunner]:
        given = ("rollout.episode=environment", f"rollout.environment.path={HERE}:{name}", "reward.name=episode")
        recipe = make_recipe(tmp_path, model, *given, *overrides, num_rows=num_rows)
        runners.append(EpisodeRunner(recipe))
        return recipe, runners[-1]

    yield make
    for runner in runners:
        runner.close()


def play(recipe: Recipe, runner: EpisodeRunner, engine: Any) -> list[Outcome]:
    async def all_rows() -> list[Outcome]:
        return await asyncio.gather(*(runner.run(engine, *one) for one in requests_of(recipe, runner)))

    return asyncio.run(all_rows())


@pytest.mark.parametrize("name", ["Guessing", "PlainGuessing"])
def test_an_environment_is_played_to_its_end(make: Make, name: str) -> None:
    recipe, runner = make(name, "rollout.environment.settings={secret: 9}")
    engine = ScriptedEngine(runner, ["5", "12", "9"])
    [trajectory] = play(recipe, runner, engine)
    assert isinstance(trajectory, Trajectory)
    assert (trajectory.reward, trajectory.num_turns, trajectory.finish_reason) == (1.5, 3, FinishReason.STOP)
    assert runner.encoder.decode(trajectory.prompt or ()) == "guess! (1+1=)"
    assert runner.encoder.decode(trajectory.tokens) == "5higher12lower9"
    assert runner.encoder.decode(trajectory.tokens[trajectory.mask == 1]) == "5129"


def test_an_environment_is_closed_when_its_episode_ends(make: Make) -> None:
    recipe, runner = make("Guessing")
    before = Guessing.closed

    async def play_one() -> None:
        await runner.run(ScriptedEngine(runner, ["7"]), *requests_of(recipe, runner)[0])
        while Guessing.closed == before:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(play_one(), 10))


def test_turns_run_out(make: Make) -> None:
    recipe, runner = make("Guessing", "rollout.max_turns=2")
    [trajectory] = play(recipe, runner, ScriptedEngine(runner, ["1", "2", "3"]))
    assert isinstance(trajectory, Trajectory)
    assert (trajectory.num_turns, trajectory.finish_reason, trajectory.reward) == (2, FinishReason.LENGTH, 0.5)


def test_a_prompt_of_the_environments_may_not_be_too_long(make: Make) -> None:
    recipe, runner = make("Guessing", "data.max_prompt_tokens=8")
    [failure] = play(recipe, runner, ScriptedEngine(runner, ["7"]))
    assert isinstance(failure, Failure) and failure.reason == "prompt_too_long"


@pytest.mark.parametrize("name", ["Misbehaving", "PlainMisbehaving"])
def test_each_way_of_misbehaving_ends_its_own_episode_and_no_other(make: Make, name: str) -> None:
    ways = [way for way in WAYS if name == "Misbehaving" or way != "crash at reset"]
    recipe, runner = make(
        name, f"rollout.environment.settings={{ways: {ways}}}".replace("'", '"'), "rollout.environment.timeout_s=1.5",
        num_rows=len(ways),
    )  # fmt: skip
    outcomes = play(recipe, runner, ScriptedEngine(runner, ["a", "b"]))
    for way, outcome in zip(ways, outcomes, strict=True):
        if way in REASONS:
            assert isinstance(outcome, Failure) and outcome.reason == REASONS[way], (way, outcome)
            assert f"{HERE}:{name} of episode" in outcome.detail
        else:
            assert isinstance(outcome, Trajectory), (way, outcome)
    assert sum(runner.failures.values()) == sum(way in REASONS for way in ways)


def test_a_coroutine_that_blocks_its_loop_is_named_and_the_next_episodes_go_on(make: Make) -> None:
    ways = ["block the loop", "well", "slow"]
    recipe, runner = make(
        "Misbehaving", f"rollout.environment.settings={{ways: {ways}}}".replace("'", '"'),
        "rollout.environment.timeout_s=1", num_rows=3,
    )  # fmt: skip
    engine = ScriptedEngine(runner, ["a", "b"])
    blocked = next(one for one in requests_of(recipe, runner) if one[1].index == 0)
    others = [one for one in requests_of(recipe, runner) if one[1].index != 0]

    async def play_all() -> list[Outcome]:
        first = await runner.run(engine, *blocked)
        return [first, *await asyncio.gather(*(runner.run(engine, *one) for one in others))]

    first, *rest = asyncio.run(play_all())
    assert isinstance(first, Failure) and first.reason == "environment_timeout"
    assert all(isinstance(outcome, Trajectory) for outcome in rest)


def test_calls_that_hang_use_up_no_thread_of_the_others() -> None:
    async def many() -> tuple[list[Any], list[Any], int]:
        calls = UserCode()
        release = threading.Event()
        hung = [asyncio.create_task(calls.call("h", release.wait, timeout_s=0.2)) for _ in range(100)]
        quick = [asyncio.create_task(calls.call("q", int, "3", timeout_s=20.0)) for _ in range(100)]
        results = await asyncio.gather(*quick)
        errors = await asyncio.gather(*hung, return_exceptions=True)
        num_given_up = calls.num_given_up
        release.set()
        while calls.num_given_up:
            await asyncio.sleep(0.01)
        calls.close()
        return results, errors, num_given_up

    results, errors, num_given_up = asyncio.run(asyncio.wait_for(many(), 60))
    assert results == [3] * 100
    assert {type(error) for error in errors} == {CallTimedOut} and num_given_up == 100
    assert str(errors[0]) == "h: no answer in 0.2 s"


def test_too_many_calls_that_hang_are_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_code, "MOST_GIVEN_UP", 3)

    async def many() -> None:
        calls, release = UserCode(), threading.Event()
        try:
            while True:  # one whose thread has not begun in that time hangs nowhere
                with suppress(CallTimedOut):
                    await calls.call("stuck", release.wait, timeout_s=0.02)
        finally:
            release.set()
            calls.close()

    with pytest.raises(RuntimeError, match="stuck: 3 calls hang"):
        asyncio.run(asyncio.wait_for(many(), 60))


def test_what_a_call_raises_comes_with_its_cause() -> None:
    async def call(function: Callable[[], Any]) -> None:
        calls = UserCode()
        try:
            await calls.call("mine", function, timeout_s=5.0)
        finally:
            calls.close()

    async def raises() -> None:
        raise KeyError("x")

    for function in (raises, lambda: {}["x"]):
        with pytest.raises(CallFailed, match=r"mine: raised KeyError\('x'\)") as caught:
            asyncio.run(call(function))
        assert isinstance(caught.value.__cause__, KeyError)


def test_a_call_given_up_before_it_began_leaves_nothing_behind() -> None:
    """A coroutine that nobody awaits is a warning, and warnings are errors here."""

    async def work() -> None:
        await asyncio.sleep(0)

    async def close_at_once() -> None:
        calls = UserCode()
        begun = asyncio.create_task(calls.call("mine", work, timeout_s=5.0))
        await asyncio.sleep(0)
        calls.close()
        with suppress(CallTimedOut):
            await begun

    for _ in range(50):
        asyncio.run(close_at_once())
    gc.collect()


class Incomplete:
    def reset(self, example: Any) -> None: ...


def test_a_class_that_lacks_a_method_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"rollout\.environment\.path: .*Incomplete'; has no method 'step'"):
        make("Incomplete")
