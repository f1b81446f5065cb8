"""An environment is a class of the user's:

    class Environment:
        def __init__(self, **settings): ...                       # rollout.environment.settings
        async def reset(self, example) -> str | list[dict] | None: ...   # what the model reads first; None: the prompt
        async def step(self, text: str) -> tuple[observation, reward, done]: ...
        async def close(self): ...                                # optional

Methods may also be ordinary functions. Every episode has an object of its own. Observations are a string, which stands
for one user message, or messages. The episode's reward is the sum of its steps' rewards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from controllers.dotted import load_attribute
from flowrl.config.episodes import EnvironmentConfig
from flowrl.data.example import Example, Message
from flowrl.rollout.failure import EpisodeFailed
from flowrl.rollout.user_code import CallFailed, CallTimedOut, UserCode

CLOSE_TIMEOUT_S = 10.0


class Step(NamedTuple):
    """What followed a turn. messages: none where there is nothing more to say."""

    messages: list[Message]
    reward: float
    is_done: bool


class Environments:
    """The recipe's environment: makes one for each episode. Raises ValueError for a class that lacks a method."""

    def __init__(self, config: EnvironmentConfig, user_code: UserCode) -> None:
        self.config = config
        self.user_code = user_code
        self.factory: Callable[..., Any] = load_attribute(config.path)
        for method in ("reset", "step"):
            if isinstance(self.factory, type) and not callable(getattr(self.factory, method, None)):
                raise ValueError(f"rollout.environment.path: {config.path!r}; has no method {method!r}")

    async def make(self, name: str) -> PlayedEnvironment:
        """name: the episode's, for messages."""
        settings: Mapping[str, Any] = self.config.settings
        played = PlayedEnvironment(f"{self.config.path} of episode {name}", self.config.timeout_s, self.user_code)
        played.environment = await played.call("__init__", lambda: self.factory(**settings))
        return played


class PlayedEnvironment:
    """One object of the user's. Whatever it does wrong ends the episode as failed: environment_timeout,
    environment_error (it raised) or environment_garbage (it returned something else than it should)."""

    def __init__(self, name: str, timeout_s: float, user_code: UserCode) -> None:
        self.name = name
        self.timeout_s = timeout_s
        self.user_code = user_code
        self.environment: Any = None

    async def reset(self, example: Example) -> list[Message] | None:
        """The prompt in place of the data set's, or None."""
        observation = await self.call("reset", self.environment.reset, example)
        return None if observation is None else self._messages("reset", observation)

    async def step(self, text: str) -> Step:
        result = await self.call("step", self.environment.step, text)
        if not isinstance(result, tuple | list) or len(result) != 3:
            raise self._garbage("step", result, "must return (observation, reward, done)")
        observation, reward, is_done = result
        if not _is_finite(reward):
            raise self._garbage("step", reward, "the reward must be a finite number")
        if not isinstance(is_done, bool) and type(is_done).__name__ not in ("bool_", "bool"):
            raise self._garbage("step", is_done, "done must be True or False")
        if is_done:
            return Step([], float(reward), True)
        return Step(self._messages("step", observation), float(reward), False)

    async def close(self) -> None:
        """Whatever goes wrong here comes too late for the episode."""
        if callable(getattr(self.environment, "close", None)):
            try:
                await self.user_code.call(f"{self.name}: close", self.environment.close, timeout_s=CLOSE_TIMEOUT_S)
            except (CallFailed, CallTimedOut) as error:
                print(f"environment: {error}", flush=True)

    async def call(self, method: str, function: Callable[..., Any], *arguments: Any) -> Any:
        label = f"{self.name}: {method}"
        try:
            return await self.user_code.call(label, function, *arguments, timeout_s=self.timeout_s)
        except CallTimedOut as error:
            raise EpisodeFailed("environment_timeout", str(error)) from error
        except CallFailed as error:
            raise EpisodeFailed("environment_error", str(error)) from error

    def _messages(self, method: str, observation: Any) -> list[Message]:
        if isinstance(observation, str):
            return [{"role": "user", "content": observation}]
        if (
            isinstance(observation, Sequence)
            and len(observation)
            and all(
                isinstance(one, Mapping) and _is_text(one, "role") and _is_text(one, "content") for one in observation
            )
        ):
            return [dict(one) for one in observation]
        raise self._garbage(method, observation, "an observation is a string or a list of messages")

    def _garbage(self, method: str, value: Any, rule: str) -> EpisodeFailed:
        shown = repr(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        return EpisodeFailed("environment_garbage", f"{self.name}: {method} returned {shown}; {rule}")


def _is_text(message: Mapping[str, Any], key: str) -> bool:
    return isinstance(message.get(key), str)


def _is_finite(value: Any) -> bool:
    try:
        return not isinstance(value, str) and math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return False
