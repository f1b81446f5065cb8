"""Runs the recipe's episodes: each within its time, whatever it does, with a trajectory or a failure at its end.

Failures are counted by reason. An engine that fails is no episode's failure: its error goes on to whoever runs this.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from controllers.dotted import load_attribute
from flowrl.config import Recipe
from flowrl.config.recipe import takes_episode_reward
from flowrl.config.rollout import EPISODES
from flowrl.data.example import Example
from flowrl.data.prompts import PromptEncoder
from flowrl.rollout.engine import Engine, EngineError, GenerateRequest
from flowrl.rollout.environments.environment import Environments
from flowrl.rollout.episodes.context import Episode, EpisodeContext
from flowrl.rollout.episodes.resuming import ResumingEngine
from flowrl.rollout.episodes.trajectory import Trajectory
from flowrl.rollout.failure import EpisodeFailed, Failure
from flowrl.rollout.tools.registry import load_tools
from flowrl.rollout.tools.tool import Toolbox
from flowrl.rollout.user_code import UserCode
from flowrl.sandbox.sandbox import Sandbox

MOST_FAILURES_IN_A_ROW = 256


class EpisodeRunner:
    """All that the recipe's episodes need, made once. `encoder`: text <-> tokens, the tools' schemas in every prompt.
    log: takes a line for people; report: takes metrics. Raises ValueError for a path that does not lead to what it
    should, SandboxUnavailable where the `python` tool cannot be confined."""

    def __init__(
        self,
        recipe: Recipe,
        log: Callable[[str], None] = print,
        report: Callable[[dict[str, float]], None] = lambda metrics: None,
    ) -> None:
        self.settings = recipe.rollout
        self.takes_reward = takes_episode_reward(recipe)
        self.log = log
        self.report = report
        self.failures: Counter[str] = Counter()
        self.user_code = UserCode()
        self.sandbox = Sandbox(self.settings.sandbox)
        if "python" in self.settings.tools:
            self.sandbox.check()
        self.toolbox = Toolbox(load_tools(self.settings, self.sandbox), self.user_code)
        self.encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens, self.toolbox.schemas)
        self.episode = load_episode(self.settings.episode)
        self.parse_calls = load_attribute(self.settings.tool_parser)
        environment = self.settings.environment
        self.environments = Environments(environment, self.user_code) if environment is not None else None
        self._running: set[asyncio.Task[Any]] = set()
        self._num_in_a_row = 0

    def serving(self, engine: Engine) -> Engine:
        """The engine as episodes are to see it."""
        return ResumingEngine(engine) if self.settings.in_flight == "abort" else engine

    def context(self, engine: Engine, request: GenerateRequest, example: Example) -> EpisodeContext:
        return EpisodeContext(
            engine=engine,
            request=request,
            example=example,
            encoder=self.encoder,
            settings=self.settings,
            user_code=self.user_code,
            toolbox=self.toolbox,
            parse_calls=self.parse_calls,
            environments=self.environments,
        )

    async def run(self, engine: Engine, request: GenerateRequest, example: Example) -> Trajectory | Failure:
        """One episode. Raises EngineError if the engine fails, RuntimeError if so many episodes have failed without one
        that did not that no more will come of it."""
        outcome = await self._outcome(self.context(engine, request, example))
        if isinstance(outcome, Trajectory):
            self._num_in_a_row = 0
        else:
            self._count(request.request_id, outcome)
        return outcome

    def stop(self) -> None:
        """Cancels the tasks in which episodes run."""
        for task in self._running:
            task.cancel()

    def close(self) -> None:
        self.stop()
        self.user_code.close()
        self.sandbox.close()

    async def _outcome(self, context: EpisodeContext) -> Trajectory | Failure:
        task = asyncio.current_task()
        assert task is not None, "a coroutine runs in a task"
        self._running.add(task)
        limit_s = self.settings.episode_timeout_s
        try:
            async with asyncio.timeout(limit_s) as timeout:
                trajectory = await self.episode(context)
        except EngineError:
            raise
        except EpisodeFailed as failed:
            return failed.failure
        except Exception as error:
            if timeout.expired():
                return Failure(reason="episode_timeout", detail=f"{self.settings.episode}: not over in {limit_s:g} s")
            return Failure(reason="episode_error", detail=f"{self.settings.episode}: raised {error!r}{_where(error)}")
        finally:
            self._running.discard(task)
        problem = self._problem(trajectory, context)
        return Failure(reason="bad_trajectory", detail=f"{self.settings.episode}: {problem}") if problem else trajectory

    def _problem(self, trajectory: Any, context: EpisodeContext) -> str:
        """What keeps it from being trained on."""
        if not isinstance(trajectory, Trajectory):
            return f"returned a {type(trajectory).__name__}, must return a Trajectory"
        lengths = [len(trajectory.tokens), len(trajectory.mask), len(trajectory.logprobs), len(trajectory.versions)]
        if len(set(lengths)) > 1:
            return f"tokens, mask, logprobs, versions: {lengths} long; must be equally long"
        if not np.asarray(trajectory.mask).any():
            return "mask: holds no 1; the model must have written something"
        if lengths[0] > context.request.sampling.max_tokens:
            return f"tokens: {lengths[0]}; at most rollout.max_tokens={context.request.sampling.max_tokens}"
        if trajectory.prompt is not None and len(trajectory.prompt) > self.encoder.max_prompt_tokens:
            return f"prompt: {len(trajectory.prompt)} tokens; at most {self.encoder.max_prompt_tokens}"
        if not self.takes_reward and trajectory.reward is not None:
            return f"reward: {trajectory.reward}; nobody takes it, set reward.name=episode"
        if self.takes_reward and (trajectory.reward is None or not math.isfinite(trajectory.reward)):
            return f"reward: {trajectory.reward}; reward.name=episode needs a finite number"
        return ""

    def _count(self, name: str, failure: Failure) -> None:
        self.failures[failure.reason] += 1
        self._num_in_a_row += 1
        number = self.failures[failure.reason]
        if number & (number - 1) == 0:  # the first, the second, the fourth, …
            self.log(f"episode {name} failed ({failure.reason}, {number} so far): {failure.detail}")
            self.report({f"rollout/failed/{reason}": float(count) for reason, count in self.failures.items()})
        if self._num_in_a_row >= MOST_FAILURES_IN_A_ROW:
            raise RuntimeError(
                f"the last {self._num_in_a_row} episodes all failed; {name}: {failure.reason}: {failure.detail}"
            )


def load_episode(name: str) -> Episode:
    """One of ours by its name, or the user's by dotted path. Raises ValueError for what is no coroutine function."""
    path = name if ":" in name else f"{EPISODES}:{name}"
    episode = load_attribute(path)
    if not asyncio.iscoroutinefunction(episode):
        raise ValueError(f"rollout.episode: {name!r}; is a {type(episode).__name__}, must be `async def (context)`")
    return episode


def _where(error: Exception) -> str:
    """The line of the user's that raised."""
    trace = error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
