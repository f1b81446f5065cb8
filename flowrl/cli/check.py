"""`flowrl check rollout|environment|reward|sandbox`: tries what a user wrote, before a run does. Needs no recipe and no
model: a tiny one is made on the spot."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flowrl.rollout.episodes.contract import Finding

RESPONSES = (
    "",
    " ",
    "0",
    "42",
    "the answer is 42",
    "#### 42",
    "\\boxed{42}",
    "<answer>42</answer>",
    "é 日本 🙂",
    "x" * 5000,
)


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("rollout", "environment", "reward", "sandbox"), help="what to try")
    parser.add_argument("path", nargs="?", help="file.py:name or package.module:name; nothing for the sandbox")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings, as in a recipe")


def run(arguments: argparse.Namespace) -> int:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.path.insert(0, str(Path.cwd()))
    overrides = list(arguments.overrides)
    path = arguments.path
    if arguments.kind == "sandbox":
        return report(check_sandbox([path, *overrides] if path else overrides))
    if not path:
        raise ValueError(f"path: missing; flowrl check {arguments.kind} needs file.py:name or package.module:name")
    check = {"rollout": check_rollout, "environment": check_environment, "reward": check_reward}[arguments.kind]
    return report(check(path, overrides))


def report(findings: Iterable[Finding]) -> int:
    """A line for each; 1 if one of them failed."""
    num_failed = 0
    for finding in findings:
        num_failed += finding.error is not None
        print(
            f"{'ok  ' if finding.error is None else 'FAIL'}  {finding.name}: {finding.error or finding.detail}",
            flush=True,
        )
    return 1 if num_failed else 0


def check_rollout(path: str, overrides: list[str]) -> Iterator[Finding]:
    from flowrl.rollout.episodes import contract

    with tempfile.TemporaryDirectory(prefix="flowrl-check-") as directory:
        recipe = contract.tiny_recipe(Path(directory), [f"rollout.episode={path}", *overrides])
        yield from contract.check_rollout(recipe)


def check_environment(path: str, overrides: list[str]) -> Iterator[Finding]:
    from flowrl.rollout.episodes import contract

    given = ["rollout.episode=environment", f"rollout.environment.path={path}", "reward.name=episode", *overrides]
    with tempfile.TemporaryDirectory(prefix="flowrl-check-") as directory:
        recipe = contract.tiny_recipe(Path(directory), given)
        kept = {contract.gives_trajectories, contract.ends_when_cancelled, contract.takes_little_time}
        yield from contract.check_rollout(recipe, [one for one in contract.ROLLOUT_CHECKS if one[1] in kept])


def check_reward(path: str, overrides: list[str]) -> Iterator[Finding]:
    """On the rows of `data.path`, or of sums; each with responses right, wrong, empty, long and strange."""
    from flowrl.config import load
    from flowrl.data.datasets import load_splits
    from flowrl.rewards.function import load_reward
    from flowrl.rollout.episodes.contract import Finding, tiny_recipe

    with tempfile.TemporaryDirectory(prefix="flowrl-check-") as directory:
        tiny_recipe(Path(directory), [])
        base = [f"model.path={directory}/model", f"reward.path={path}", f"data.path={directory}/data.jsonl"]
        recipe = load(Path(directory) / "recipe.yaml", [*base, *overrides])
        reward = load_reward(recipe.reward, Path.cwd())
        rows = list(load_splits(recipe.data, recipe.eval).train)[:8]
    examples = [row for row in rows for _ in range(len(RESPONSES) + 1)]
    responses = [text for row in rows for text in (str(row.ground_truth), *RESPONSES)]
    started = time.monotonic()
    try:
        scores = [score.value for score in reward(examples, responses)]
    except ValueError as error:
        yield Finding(name="scores what a model may write", error=str(error), detail="")
        return
    took_s = time.monotonic() - started
    span = f"from {min(scores):g} to {max(scores):g}"
    yield Finding(name="scores what a model may write", error=None, detail=f"{len(scores)} responses, {span}")
    again = [score.value for score in reward(examples, responses)]
    differ = sum(one != other for one, other in zip(scores, again, strict=True))
    other = f"{differ} of {len(scores)} responses got another score" if differ else None
    yield Finding(name="gives the same score again", error=other, detail="as it should")
    right = [
        score for score, text, row in zip(scores, responses, examples, strict=True) if text == str(row.ground_truth)
    ]
    best = f"the ground truth itself scores {min(right):g} at least, an empty response {scores[1]:g}"
    yield Finding(name="tells right from wrong", error=None if min(right) > scores[1] else best, detail=best)
    yield Finding(name="time", error=None, detail=f"{1000 * took_s / len(scores):.2f} ms a response")


def check_sandbox(overrides: list[str]) -> Iterator[Finding]:
    """Which isolation is possible on this machine, and how long a call takes. It fails where full isolation is not."""
    from flowrl.config.episodes import SandboxConfig
    from flowrl.rollout.episodes.contract import Finding
    from flowrl.sandbox.sandbox import Sandbox, SandboxUnavailable

    if overrides:
        raise ValueError(f"overrides: {overrides}; flowrl check sandbox takes none")
    for isolation in ("full", "limits"):
        with contextlib.closing(Sandbox(SandboxConfig(isolation=isolation))) as sandbox:
            try:
                sandbox.check()
            except SandboxUnavailable as error:
                refused = str(error) if isolation == "full" else None
                yield Finding(name=f"isolation: {isolation}", error=refused, detail=str(error))
                continue
            started = time.monotonic()
            for _ in range(10):
                sandbox.run_blocking("pass")
            took_ms = 100 * (time.monotonic() - started)
            yield Finding(name=f"isolation: {isolation}", error=None, detail=f"possible here, {took_ms:.0f} ms a call")
