"""`flowrl run RECIPE [field.name=value …]`: checks the recipe, then runs this node's controller to the end."""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controllers.topology import Topology
    from flowrl.config import Recipe
    from flowrl.pipeline import Pipeline
    from flowrl.record.lives import Life

FAILED = 1


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings that replace the recipe's")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run of this name from its newest checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved recipe, the graph and the placement; start nothing"
    )


def run(arguments: argparse.Namespace) -> int:
    from controllers.topology import Topology
    from flowrl import config, pipeline

    topology = Topology.from_environment()
    recipe = config.load(arguments.recipe, arguments.overrides)
    built = pipeline.build(recipe, topology.num_nodes)
    if arguments.dry_run:
        print(describe(built, arguments.resume))
        return 0
    return train(built, topology, is_resumed=arguments.resume)


def describe(built: Pipeline, is_resumed: bool) -> str:
    from controllers.drawing import graph_text, placement_text
    from flowrl.config import to_yaml

    sections = {
        "Recipe": to_yaml(built.recipe).rstrip(),
        "Graph": graph_text(built.graph),
        "Placement": placement_text(built.workers, "rollout", "train"),
        "Directory": directory_text(built.recipe, is_resumed),
    }
    return "\n\n".join(f"# {title}\n{text}" for title, text in sections.items())


def directory_text(recipe: Recipe, is_resumed: bool) -> str:
    """Where the run would leave what it leaves, and whether it may."""
    from flowrl.record.run_directory import recipe_name

    directory = Path(recipe.run.dir) / recipe.run.name
    is_there = (directory / recipe_name(0)).exists()
    if is_resumed:
        return f"{directory}, whose run goes on" if is_there else f"{directory} holds no run to resume"
    if is_there:
        return f"{directory} holds a run already: choose another run.name, move it away, or go on with it by --resume"
    return f"{directory}, which holds no run yet"


def train(built: Pipeline, topology: Topology, is_resumed: bool) -> int:
    """One life of the run after the other, as long as another may help. The exit code is the last one's."""
    from flowrl.record import lives

    directory = Path(built.recipe.run.dir) / built.recipe.run.name
    goes_on = is_resumed or lives.is_started_again(directory, topology)
    fruitless = 0
    while True:
        life, code, summary = live(built, topology, goes_on)
        progress = lives.newest_checkpoint(directory)[0]
        fruitless = 0 if progress > life.step else fruitless + 1
        # Several nodes can only begin anew together, which is torchrun's to bring about (--max-restarts).
        if code != FAILED or not progress or topology.num_nodes > 1 or fruitless > built.recipe.run.restarts:
            break
        print(f"going on from step {progress}, the newest checkpoint", flush=True)
        goes_on = True
    if topology.node == 0:
        from flowrl.report.run_report import print_report

        print_report(directory, summary)
    return code


def live(built: Pipeline, topology: Topology, goes_on: bool) -> tuple[Life, int, dict[str, Any]]:
    """One life; returns it, its exit code and its summary."""
    from controllers.node import NodeController
    from flowrl.pipeline import controller_settings, worker_settings
    from flowrl.record import lives
    from flowrl.record.display import Display
    from flowrl.record.recorder import Recorder

    recipe = built.recipe
    directory, recipe_path, life = open_directory(recipe, topology.node, goes_on)
    lives.note_launcher(directory, topology)
    ensure_model(Path(recipe.model.path), recipe_path)
    with Display(recipe.run.name, recipe.train.steps, is_shown=topology.node == 0) as display:
        recorder = Recorder(recipe, directory, topology.node, display)
        controller = NodeController(
            topology,
            built.graph,
            built.workers,
            controller_settings(built, directory, life),
            worker_settings(built, recipe_path),
            recorder.observers(),
        )
        code = controller.run()
        summary = recorder.close()
    return life, code, summary


def open_directory(recipe: Recipe, node: int, goes_on: bool) -> tuple[Path, Path, Life]:
    """The run's directory, this node's recipe in it, and the life that begins now."""
    from flowrl.record import lives, run_directory

    if not goes_on:
        directory, recipe_path = run_directory.create(recipe, node)
        life = lives.Life(number=0)
        if node == 0:
            lives.note_life(directory, life)
        return directory, recipe_path, life
    directory = (Path(recipe.run.dir) / recipe.run.name).resolve()
    life = lives.next_life(recipe, directory, node)
    if node == 0:
        note_resumed(directory, life)
    return directory, directory / run_directory.recipe_name(node), life


def note_resumed(directory: Path, life: Life) -> None:
    """What the event log tells so far of updates from `version` on has not been, for this life."""
    from controllers.eventlog import EventLog

    with EventLog(directory / "events.jsonl", node=0) as log:
        log.write("resumed", life=life.number, version=life.step)


def ensure_model(path: Path, recipe_path: Path) -> None:
    """Makes the model if the recipe says how and it is not there. In a process of its own: a controller holds no torch.
    The nodes of one machine meet at a lock, and one of them makes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        print(f"making the model {path}", flush=True)
        made = subprocess.run([sys.executable, "-m", "flowrl", "init-model", str(recipe_path)], check=False)
        if made.returncode:
            raise ValueError(f"model.path: {str(path)!r}; making the model failed, see above")
