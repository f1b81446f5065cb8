"""A thousand episodes at once, half of them against environments that misbehave: none is lost, and none waits."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from flowrl.rollout.episodes import Trajectory
from flowrl.rollout.episodes.runner import EpisodeRunner
from tests.rollout.episode_parts import ScriptedEngine, make_model, make_recipe, requests_of, turn_of
from tests.rollout.test_environments import Misbehaving

HERE = "tests.rollout.test_episodes_scale"
NUM_EPISODES = 1000
# What each does, and what is to become of it.
WAYS = {
    "well": "finished", "slow": "finished", "hang": "environment_timeout", "hang in a thread": "environment_timeout",
    "crash at reset": "environment_error", "crash": "environment_error", "garbage": "environment_garbage",
    "bad reward": "environment_garbage",
}  # fmt: skip
release = threading.Event()


def way_of(index: int) -> str:
    return "well" if index % 2 else list(WAYS)[index // 2 % len(WAYS)]


class Crowd(Misbehaving):
    """`Misbehaving`, the way chosen by the row; three turns for those that behave."""

    def __init__(self) -> None:
        super().__init__([])
        self.turns = 0

    async def reset(self, example: Any) -> None:
        self.ways = [way_of(example.index)] * NUM_EPISODES
        await super().reset(example)

    def step(self, text: str) -> Any:
        if self.way == "hang in a thread":
            release.wait(60)
        return self.play(text)

    async def play(self, text: str) -> Any:
        self.turns += 1
        if self.way == "well":
            return f"turn {self.turns}", 1.0, self.turns == 3
        return await super().step(text)


def test_every_one_of_a_thousand_episodes_ends_with_an_outcome(tmp_path: Path) -> None:
    recipe = make_recipe(
        tmp_path, make_model(tmp_path / "model"), "rollout.episode=environment", "reward.name=episode",
        f"rollout.environment={{path: '{HERE}:Crowd', timeout_s: 6}}", num_rows=NUM_EPISODES,
    )  # fmt: skip
    runner = EpisodeRunner(recipe, log=lambda line: None)
    engine = ScriptedEngine(runner, lambda request: f"move {turn_of(request)}")
    engine.seconds = 0.05
    found: Counter[tuple[str, str]] = Counter()

    async def one(request: Any, example: Any) -> None:
        outcome = await runner.run(engine, request, example)
        found[way_of(example.index), "finished" if isinstance(outcome, Trajectory) else outcome.reason] += 1

    async def all_at_once() -> None:
        await asyncio.gather(*(one(*given) for given in requests_of(recipe, runner)))

    try:
        asyncio.run(asyncio.wait_for(all_at_once(), 90))
    finally:
        release.set()
        runner.close()
    expected = Counter((way_of(index), WAYS[way_of(index)]) for index in range(NUM_EPISODES))
    assert found == expected
    assert engine.num_running == 0
    assert sum(runner.failures.values()) == sum(count for (_, outcome), count in found.items() if outcome != "finished")
