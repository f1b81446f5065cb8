"""1,000 multi-turn episodes at once, against environments that are slow, hang, crash or return garbage: do the healthy
ones notice, and is every one accounted for?

    python -m benchmarks.episodes [--episodes 1000] [--bad 0.2] [--rounds 3]

One engine (the embedded one, a tiny model, one thread), the run's own episodes. A round plays the same healthy
episodes three times: alone, among neighbours that are healthy too, and among neighbours that misbehave at their first
step, after one turn of tokens. It compares the healthy ones' tokens a second, from the start to the end of the last of
them. What the neighbours' own tokens cost is in it: it is printed as the share of all tokens that is the healthy ones'.
On a busy machine look at the second figure, which counts the process's CPU seconds instead.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.config import Recipe
from flowrl.data.example import Example
from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import GenerateRequest, SamplingParams
from flowrl.rollout.episodes import Trajectory
from flowrl.rollout.episodes.contract import MODEL_TOKENS, tiny_recipe
from flowrl.rollout.episodes.recording import RecordingEngine
from flowrl.rollout.episodes.runner import EpisodeRunner

WAYS = ("slow", "hang", "hang in a thread", "crash", "garbage")
TURNS = 4
TURN_TOKENS = 24
TIMEOUT_S = 20.0
SLOW_S = 3.0


class Game:
    """Ends after `TURNS` turns; the row's extra_info says how it behaves."""

    def __init__(self) -> None:
        self.way = ""
        self.turn = 0

    async def reset(self, example: Example) -> None:
        self.way = str(example.extra_info["way"])

    def step(self, text: str) -> Any:
        """An ordinary function where it hangs in a thread, otherwise a coroutine."""
        if self.way == "hang in a thread":
            time.sleep(TIMEOUT_S + 10)
        return self.play(text)

    async def play(self, text: str) -> Any:
        self.turn += 1
        if self.way == "slow":
            await asyncio.sleep(SLOW_S)
        elif self.way == "hang":
            await asyncio.sleep(3600)
        elif self.way == "crash":
            raise RuntimeError("the game broke")
        elif self.way == "garbage":
            return {"observation": text}
        return "go on", 0.25, self.turn == TURNS


@dataclass(frozen=True, kw_only=True)
class Played:
    """healthy_s, healthy_cpu_s: until the last healthy episode ended. all_tokens: of every episode until then.
    outcomes: reasons of failures, 'finished' for the others."""

    healthy_s: float
    healthy_cpu_s: float
    healthy_tokens: int
    all_tokens: int
    outcomes: Counter[str]

    @property
    def tokens_s(self) -> float:
        return self.healthy_tokens / self.healthy_s

    @property
    def tokens_cpu_s(self) -> float:
        return self.healthy_tokens / self.healthy_cpu_s


async def play(recipe: Recipe, ways: Sequence[str]) -> Played:
    """ways: one for each episode; '' for the healthy ones that are measured, 'well' for healthy neighbours."""
    runner = EpisodeRunner(recipe, log=lambda line: None)
    engine = RecordingEngine(
        EmbeddedEngine(max_model_tokens=MODEL_TOKENS, max_batch=256, prefill_tokens=4096, threads=1)
    )
    await engine.start(Path(recipe.model.path), 0)
    outcomes: Counter[str] = Counter()
    healthy_tokens = 0
    started, cpu_started = time.monotonic(), time.process_time()
    end = (0.0, 0.0, 0)

    async def one(number: int, way: str) -> None:
        nonlocal end, healthy_tokens
        example = Example(index=number, prompt=f"{number}+1=", data_source="", ground_truth="", extra_info={"way": way})
        sampling = SamplingParams(max_tokens=recipe.rollout.max_tokens, seed=number)
        prompt = runner.encoder.encode(example.prompt)
        request = GenerateRequest(request_id=str(number), tokens=prompt, sampling=sampling)
        outcome = await runner.run(engine, request, example)
        outcomes["finished" if isinstance(outcome, Trajectory) else outcome.reason] += 1
        if way == "":
            assert isinstance(outcome, Trajectory), "a healthy episode failed"
            healthy_tokens += int(outcome.mask.sum())
            end = (time.monotonic() - started, time.process_time() - cpu_started, len(engine.said))

    await asyncio.gather(*(one(number, way) for number, way in enumerate(ways)))
    await engine.close()
    runner.close()
    return Played(
        healthy_s=end[0],
        healthy_cpu_s=end[1],
        healthy_tokens=healthy_tokens,
        all_tokens=sum(len(generation.tokens) for _, generation in engine.said[: end[2]]),
        outcomes=outcomes,
    )


def make_recipe(directory: Path) -> Recipe:
    return tiny_recipe(
        directory,
        [
            "rollout.episode=environment",
            f"rollout.environment={{path: '{__file__}:Game', timeout_s: {TIMEOUT_S}}}",
            "reward.name=episode",
            f"rollout.turn_tokens={TURN_TOKENS}",
            f"rollout.max_turns={TURNS}",
            "rollout.max_tokens=256",
        ],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--bad", type=float, default=0.2, help="share of the episodes that misbehave")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    num_bad = int(given.episodes * given.bad)
    healthy = [""] * (given.episodes - num_bad)
    bad = [WAYS[number % len(WAYS)] for number in range(num_bad)]
    ratios: dict[str, list[float]] = {"alone": [], "among healthy ones": []}
    with tempfile.TemporaryDirectory() as directory:
        recipe = make_recipe(Path(directory))
        for number in range(given.rounds):
            others = {
                "alone": asyncio.run(play(recipe, healthy)),
                "among healthy ones": asyncio.run(play(recipe, mixed(healthy, ["well"] * num_bad))),
            }
            among = asyncio.run(play(recipe, mixed(healthy, bad)))
            assert sum(among.outcomes.values()) == given.episodes, "an episode is lost"
            share = among.healthy_tokens / among.all_tokens
            print(f"round {number}: {len(healthy)} healthy episodes, {num_bad} neighbours; {dict(among.outcomes)}")
            print(f"  among bad ones      {among.tokens_s:8,.0f} tokens/s, {share:.3f} of all tokens", flush=True)
            for name, other in others.items():
                ratios[name].append(among.tokens_s / other.tokens_s)
                cpu = among.tokens_cpu_s / other.tokens_cpu_s
                print(f"  {name:<19} {other.tokens_s:8,.0f} tokens/s: ratio {ratios[name][-1]:.3f}, by CPU {cpu:.3f}")
    for name, found in ratios.items():
        print(
            f"healthy throughput among bad episodes / {name}: {statistics.median(found):.3f} (median of {len(found)})"
        )


def mixed(healthy: Sequence[str], others: Sequence[str]) -> list[str]:
    """The others spread evenly among the healthy ones."""
    result = list(healthy)
    every = max(1, len(healthy) // max(1, len(others)))
    for number, way in enumerate(others):
        result.insert(number * (every + 1), way)
    return result


if __name__ == "__main__":
    main()
