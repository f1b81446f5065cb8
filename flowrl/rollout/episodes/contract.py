"""What every episode must do, tried on a tiny model behind a real engine. `flowrl check rollout` prints the findings.

Each check is one coroutine; it raises `CheckFailed` with what was expected, or returns a line for people.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flowrl.config import ModelInitConfig, Recipe, load
from flowrl.data.datasets import load_splits
from flowrl.data.example import Example
from flowrl.model_init import create_model
from flowrl.rollout.embedded.engine import EmbeddedEngine
from flowrl.rollout.engine import EngineError, GenerateRequest, PauseMode, SamplingParams
from flowrl.rollout.episodes.recording import RecordingEngine
from flowrl.rollout.episodes.resuming import ResumingEngine
from flowrl.rollout.episodes.runner import EpisodeRunner
from flowrl.rollout.episodes.trajectory import Trajectory
from flowrl.rollout.failure import Failure

NUM_ROWS = 16
MAX_TOKENS = 96
MODEL_TOKENS = 2048
UNDERWAY_S = 0.05
PATIENCE_S = 10.0
ALPHABET = "".join(chr(code) for code in range(32, 127)) + "\n"


class CheckFailed(Exception):
    """The message says what was expected and what came."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """error: None if the check holds. detail: a line for people."""

    name: str
    error: str | None
    detail: str


def tiny_recipe(directory: Path, overrides: Sequence[str]) -> Recipe:
    """A recipe of sums in `directory`, with a model of random weights; `overrides` win, also over the data."""
    init = ModelInitConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, intermediate_size=64, max_tokens=MODEL_TOKENS)
    create_model(directory / "model", init, [ALPHABET, "1+1="])
    rows = [{"prompt": f"{n}+{n}=", "ground_truth": str(2 * n)} for n in range(1, NUM_ROWS + 1)]
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "recipe.yaml").write_text("run: {name: check}\n")
    given = [f"model.path={directory}/model", f"data.path={directory}/data.jsonl", f"rollout.max_tokens={MAX_TOKENS}"]
    has_reward = any(override.startswith("reward") for override in overrides)
    return load(directory / "recipe.yaml", [*given, *([] if has_reward else ["reward.name=exact_match"]), *overrides])


class Bench:
    """One engine and the recipe's episodes on it, for the length of a check."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        self.runner = EpisodeRunner(recipe, log=lambda line: None)
        inner = EmbeddedEngine(max_model_tokens=MODEL_TOKENS, max_batch=NUM_ROWS, threads=1)
        self.engine = RecordingEngine(ResumingEngine(inner))
        self.model = Path(recipe.model.path)
        self.examples: list[Example] = list(load_splits(recipe.data, recipe.eval).train)[:NUM_ROWS]

    def requests(self, round_number: int = 0) -> list[tuple[GenerateRequest, Example]]:
        sampling = SamplingParams(
            max_tokens=self.recipe.rollout.max_tokens,
            stop_token_ids=self.runner.encoder.stop_token_ids,
            seed=round_number,
        )
        return [
            (
                GenerateRequest(
                    request_id=f"{round_number}.{example.index}",
                    tokens=self.runner.encoder.encode(example.prompt),
                    sampling=sampling,
                ),
                example,
            )
            for example in self.examples
        ]

    def start(self, round_number: int) -> list[asyncio.Task[Trajectory | Failure]]:
        return [
            asyncio.create_task(self.runner.run(self.engine, request, example))
            for request, example in self.requests(round_number)
        ]

    async def finish(self, tasks: Sequence[asyncio.Task[Trajectory | Failure]], what: str) -> list[Trajectory]:
        """All of them, as trajectories that are what the engine said."""
        _, pending = await asyncio.wait(tasks, timeout=self.recipe.rollout.episode_timeout_s + PATIENCE_S)
        if pending:
            raise CheckFailed(f"{len(pending)} of {len(tasks)} episodes had not ended {what}")
        trajectories = []
        for task in tasks:
            outcome = task.result()
            if isinstance(outcome, Failure):
                raise CheckFailed(f"an episode failed {what}: {outcome.reason}: {outcome.detail}")
            trajectories.append(outcome)
        for trajectory, (request, _) in zip(trajectories, self.requests(), strict=True):
            disagreement = self.engine.disagreement(trajectory, request.tokens)
            if disagreement:
                raise CheckFailed(f"{what}: {disagreement}")
        return trajectories


Check = Callable[[Bench], Awaitable[str]]


async def gives_trajectories(bench: Bench) -> str:
    """Side by side; every token with mask 1 is the engine's own, behind the very context that it was sampled in."""
    trajectories = await bench.finish(bench.start(1), "when nothing disturbed them")
    lengths = [len(trajectory.tokens) for trajectory in trajectories]
    written = sum(int(trajectory.mask.sum()) for trajectory in trajectories)
    turns = max(trajectory.num_turns for trajectory in trajectories)
    return f"{len(lengths)} episodes, up to {turns} turns, {sum(lengths)} tokens, {written} of them the model's"


async def takes_little_time(bench: Bench) -> str:
    """Alone, one after the other."""
    bench.engine.engine_s = 0.0
    requests = bench.requests(2)[:4]
    started = time.monotonic()
    for request, example in requests:
        await bench.runner.run(bench.engine, request, example)
    took_s = (time.monotonic() - started) / len(requests)
    engine_s = bench.engine.engine_s / len(requests)
    return f"{1000 * took_s:.1f} ms an episode, {1000 * max(0.0, took_s - engine_s):.1f} ms of it outside the engine"


async def outlives_weight_updates(bench: Bench) -> str:
    """With KV kept, with KV recomputed, and with responses aborted and resumed."""
    spans = 0
    for number, mode in enumerate((PauseMode.KEEP, PauseMode.RECOMPUTE, PauseMode.ABORT), start=3):
        tasks = bench.start(number)
        await asyncio.sleep(UNDERWAY_S)
        await bench.engine.load_weights(bench.model, bench.engine.version + 1, mode)
        trajectories = await bench.finish(tasks, f"over a weight update ({mode.value})")
        spans += sum(len(trajectory.spans()) > 1 for trajectory in trajectories)
    return f"{spans} trajectories span two versions"


async def ends_when_aborted(bench: Bench) -> str:
    tasks = bench.start(6)
    await asyncio.sleep(UNDERWAY_S)
    started = time.monotonic()
    pending: set[asyncio.Task[Trajectory | Failure]] = set(tasks)
    while pending and time.monotonic() < started + PATIENCE_S:
        await bench.engine.abort()
        _, pending = await asyncio.wait(pending, timeout=UNDERWAY_S)
    if pending:
        for task in pending:
            task.cancel()
        raise CheckFailed(
            f"{len(pending)} episodes go on though every generation comes back with FinishReason.ABORT: end there"
        )
    return f"all had ended {time.monotonic() - started:.2f} s after the abort"


async def ends_when_cancelled(bench: Bench) -> str:
    tasks = bench.start(7)
    await asyncio.sleep(UNDERWAY_S)
    bench.runner.stop()
    _, pending = await asyncio.wait(tasks, timeout=PATIENCE_S)
    if pending:
        raise CheckFailed(f"{len(pending)} episodes go on after CancelledError: let it through")
    if bench.engine.running:
        raise CheckFailed(f"{len(bench.engine.running)} requests still run: await them, start no tasks of their own")
    return "nothing was left running"


async def passes_on_the_engines_failure(bench: Bench) -> str:
    bench.engine.fails = True
    request, example = bench.requests(8)[0]
    try:
        outcome = await bench.runner.run(bench.engine, request, example)
    except EngineError:
        return "an EngineError reaches the run"
    finally:
        bench.engine.fails = False
    raise CheckFailed(
        f"the engine failed, and the episode made of it a {type(outcome).__name__}: let EngineError through"
    )


ROLLOUT_CHECKS: tuple[tuple[str, Check], ...] = (
    ("gives trajectories that are the engine's own", gives_trajectories),
    ("outlives weight updates", outlives_weight_updates),
    ("ends when the engine aborts", ends_when_aborted),
    ("ends when it is cancelled", ends_when_cancelled),
    ("passes on the engine's failure", passes_on_the_engines_failure),
    ("time", takes_little_time),
)


def check_rollout(recipe: Recipe, checks: Sequence[tuple[str, Check]] = ROLLOUT_CHECKS) -> Iterator[Finding]:
    """Each check on a bench of its own, in its order."""
    for name, check in checks:
        with opened(recipe) as bench:
            try:
                yield Finding(name=name, error=None, detail=asyncio.run(_on_started(bench, check)))
            except CheckFailed as error:
                yield Finding(name=name, error=str(error), detail="")


async def _on_started(bench: Bench, check: Check) -> str:
    await bench.engine.start(bench.model, 0)
    try:
        return await check(bench)
    finally:
        await bench.engine.close()


@contextmanager
def opened(recipe: Recipe) -> Iterator[Bench]:
    bench = Bench(recipe)
    try:
        yield bench
    finally:
        bench.runner.close()
