"""Groups of episodes with several turns, on a real engine, while weights are replaced in the middle of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowrl.config import ModelInitConfig
from flowrl.model_init import create_model
from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import GenerateRequest, PauseMode, SamplingParams
from flowrl.rollout.episodes import Trajectory
from flowrl.rollout.episodes.runner import EpisodeRunner
from flowrl.rollout.scheduling.groups import first_to_end
from tests.rollout.conformance import TOLERANCE
from tests.rollout.episode_parts import ALPHABET, make_recipe, requests_of
from tests.rollout.reference import reference_logprobs

HERE = "tests.rollout.test_episodes_interrupted"
GROUP_SIZE = 4
TURNS = 3
UPDATES = 4


class Game:
    """Goes on for three turns and says something between them."""

    def __init__(self) -> None:
        self.turn = 0

    def reset(self, example: Any) -> None: ...

    async def step(self, text: str) -> tuple[str, float, bool]:
        self.turn += 1
        return f"turn {self.turn}", 1.0, self.turn == TURNS


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models with one tokenizer."""
    found = [tmp_path_factory.mktemp("models") / f"model{seed}" for seed in (0, 1)]
    for seed, path in enumerate(found):
        init = ModelInitConfig(
            hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64, max_tokens=1024, seed=seed
        )
        create_model(path, init, [ALPHABET, "1+2="])
    return found


@pytest.mark.parametrize("mode", list(PauseMode))
def test_a_group_of_several_turns_outlives_updates_with_each_tokens_own_version_and_log_prob(
    paths: list[Path], tmp_path: Path, mode: PauseMode
) -> None:
    """With KV kept only the versions are exact: what follows an update was sampled with older KV."""
    torch.set_num_threads(1)
    recipe = make_recipe(
        tmp_path, paths[0], "rollout.episode=environment", f"rollout.environment.path={HERE}:Game",
        "reward.name=episode", f"rollout.in_flight={mode.value}", "rollout.turn_tokens=96", num_rows=1,
    )  # fmt: skip
    runner = EpisodeRunner(recipe)
    inner = EmbeddedEngine(max_batch=GROUP_SIZE + 1, max_model_tokens=1024, threads=1)
    engine = runner.serving(inner)
    [(request, example)] = requests_of(recipe, runner)
    group: dict[int, Trajectory] = {}

    async def one(place: int) -> Any:
        sampling = SamplingParams(max_tokens=recipe.rollout.max_tokens, seed=place)
        mine = GenerateRequest(request_id=f"0.{place}.0", tokens=request.tokens, sampling=sampling)
        return await runner.run(engine, mine, example)

    async def updates() -> None:
        pilot = GenerateRequest(request_id="pilot", tokens=(3, 4), sampling=SamplingParams(max_tokens=8))
        await engine.generate(pilot)  # when it ends the others have begun
        for version in range(1, UPDATES + 1):
            await engine.load_weights(paths[version % 2], version, mode)
            await asyncio.sleep(0.04)

    async def play() -> Any:
        await engine.start(paths[0], 0)
        try:
            ended, _ = await asyncio.gather(
                first_to_end([one(place) for place in range(GROUP_SIZE)], GROUP_SIZE, group.__setitem__), updates()
            )
            return ended
        finally:
            await engine.close()

    try:
        assert asyncio.run(asyncio.wait_for(play(), 60)) is None, "no failure"
    finally:
        runner.close()
    assert sorted(group) == list(range(GROUP_SIZE)), "the group is whole"
    assert max(len(trajectory.spans()) for trajectory in group.values()) > 1, "an update came in the middle"
    for trajectory in group.values():
        assert trajectory.num_turns == TURNS
        wrote = trajectory.mask.astype(bool)
        assert (np.diff(trajectory.versions) >= 0).all()
        assert not trajectory.logprobs[~wrote].any() and (trajectory.logprobs[wrote] < 0).all()
        if mode is not PauseMode.KEEP:
            check_log_probs(paths, trajectory.prompt or request.tokens, trajectory, wrote)


def check_log_probs(paths: list[Path], prompt: tuple[int, ...], trajectory: Trajectory, wrote: np.ndarray) -> None:
    """Those of a forward over the whole transcript, with the weights that a token's version names and no others."""
    tokens = trajectory.tokens.tolist()
    of_model = [
        reference_logprobs(path, prompt, tokens)[torch.arange(len(tokens)), torch.tensor(tokens)].numpy()
        for path in paths
    ]
    own = np.where(trajectory.versions % 2, of_model[1], of_model[0])
    other = np.where(trajectory.versions % 2, of_model[0], of_model[1])
    np.testing.assert_allclose(trajectory.logprobs[wrote], own[wrote], atol=TOLERANCE)
    assert np.abs(other - own)[wrote].mean() > 10 * TOLERANCE, "the models differ"
