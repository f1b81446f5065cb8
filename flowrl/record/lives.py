"""The lives of a run: what lies between two starts of it. Each goes on from the newest checkpoint of those before.

    lives.jsonl               a line for each life: its number, the checkpoint and step it began with, the time
    recipe.life0.yaml         the recipe of a life that is over; recipe.yaml is that of the last
    launchers                 a line for each torchrun, and controller of it, that has begun a life of the run

What a life leaves in metrics.jsonl beyond the checkpoint that the next begins with is taken out of it: the file tells
of the updates that count. events.jsonl keeps everything, with a line `resumed` where a life begins.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controllers.topology import Topology
from flowrl.config import Recipe, load, to_yaml
from flowrl.record.run_directory import recipe_name, refuse_versions_of_another
from flowrl.weights.place import versions_on_disk

CHECKPOINTS_DIR = "checkpoints"
_LIVES_FILE = "lives.jsonl"
_LAUNCHERS_FILE = "launchers"
_CHECKPOINT_NAME = re.compile(r"step_(\d+)")

MAY_CHANGE = ("run", "pools", "network", "queue", "weights", "eval", "stages", "producers")
"""Sections of a recipe that a later life may have otherwise: where and how it runs, not what it computes."""
MAY_CHANGE_WITHIN = {"train": ("steps", "micro_batch_tokens"), "rollout": ("concurrency", "python", "server_args")}


@dataclass(frozen=True, kw_only=True)
class Life:
    """restore_from: the checkpoint, a path below the run's directory; empty for one that begins with nothing."""

    number: int
    step: int = 0
    restore_from: str = ""


def newest_checkpoint(directory: Path) -> tuple[int, str]:
    """(step, path below the run's directory) of the newest whole one, or (0, "")."""
    checkpoints = directory / CHECKPOINTS_DIR
    matches = [_CHECKPOINT_NAME.fullmatch(path.name) for path in checkpoints.iterdir()] if checkpoints.is_dir() else []
    step = max((int(match[1]) for match in matches if match), default=0)
    return (step, f"{CHECKPOINTS_DIR}/step_{step}") if step else (0, "")


def is_started_again(directory: Path, topology: Topology) -> bool:
    """By the torchrun that has begun the run, which goes on then. torchrun's own count does not say so: it counts how
    often this node's controller has failed, also when that was refused another run's directory, and under c10d it
    starts those of other nodes again without counting."""
    has_begun = any((directory / recipe_name(node)).is_file() for node in (0, topology.node))
    return has_begun and topology.launcher in _launchers(directory)


def note_launcher(directory: Path, topology: Topology) -> None:
    if topology.launcher and topology.launcher not in _launchers(directory):
        with (directory / _LAUNCHERS_FILE).open("a", encoding="utf-8") as file:
            file.write(topology.launcher + "\n")


def _launchers(directory: Path) -> list[str]:
    path = directory / _LAUNCHERS_FILE
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def next_life(recipe: Recipe, directory: Path, node: int) -> Life:
    """Prepares the directory of an earlier life for another, on every node, before anything starts.

    Raises ValueError if there is no run, or one that this recipe does not go on from.
    """
    saved = directory / recipe_name(node)
    if not (directory / recipe_name(0)).is_file():
        if saved.is_file():
            raise ValueError(
                f"run.dir: {recipe.run.dir!r}; {directory} has no {recipe_name(0)}, so node 0 has it on another disk; "
                "a run goes on only from checkpoints that all nodes see"
            )
        raise ValueError(f"run.name: {recipe.run.name!r}; {directory} holds no run to resume")
    before = load(directory / recipe_name(0))
    refuse_other_run(before, recipe)
    if node == 0 and versions_on_disk(recipe) != versions_on_disk(before):
        refuse_versions_of_another(recipe)
    step, checkpoint = newest_checkpoint(directory)
    life = Life(number=len(lives(directory)), step=step, restore_from=checkpoint)
    if node == 0:
        os.link(saved, directory / f"recipe.life{life.number - 1}.yaml")
        _forget_what_came_after(directory, life)
        note_life(directory, life)
    _replace(saved, to_yaml(recipe))
    return life


def note_life(directory: Path, life: Life) -> None:
    """On node 0, for every life, the first too."""
    with (directory / _LIVES_FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(life) | {"t": time.time()}) + "\n")


def lives(directory: Path) -> list[dict[str, Any]]:
    """All so far, the first first."""
    path = directory / _LIVES_FILE
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def refuse_other_run(saved: Recipe, given: Recipe) -> None:
    """Raises ValueError naming the first setting that a resumed run may not change."""
    before, now = dict(_settings(saved)), dict(_settings(given))
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"{name}: {now.get(name)!r}; the run to be resumed has {before.get(name)!r}, and only "
                f"{', '.join(MAY_CHANGE)}, train.steps and rollout.concurrency may change"
            )


def _settings(recipe: Recipe) -> Iterator[tuple[str, Any]]:
    """Those that may not change, by dotted name."""
    for section, content in asdict(recipe).items():
        if section in MAY_CHANGE:
            continue
        if not isinstance(content, dict):
            yield section, content
            continue
        for name, value in content.items():
            if name not in MAY_CHANGE_WITHIN.get(section, ()):
                yield f"{section}.{name}", value


def _forget_what_came_after(directory: Path, life: Life) -> None:
    """Results of the end, and of updates that will be done again."""
    shutil.rmtree(directory / "model", ignore_errors=True)
    if not life.restore_from:
        shutil.rmtree(directory / "warm_start", ignore_errors=True)
    metrics = directory / "metrics.jsonl"
    if metrics.is_file():
        reports = (
            json.loads(line)
            for line in metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            if line.endswith("\n")
        )
        kept = [report for report in reports if report["step"] is None or report["step"] <= life.step]
        _replace(metrics, "".join(json.dumps(report) + "\n" for report in kept))


def _replace(path: Path, content: str) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
