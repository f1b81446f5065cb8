"""`flowrl run RECIPE [field.name=value …]`: checks the recipe, then runs this node's controller to the end."""

from __future__ import annotations

import argparse
import fcntl
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from controllers.topology import Topology
    from flowrl.pipeline import Pipeline


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings that replace the recipe's")
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
        print(describe(built))
        return 0
    return train(built, topology)


def describe(built: Pipeline) -> str:
    from controllers.drawing import graph_text, plan_table
    from flowrl.config import to_yaml

    sections = {
        "Recipe": to_yaml(built.recipe).rstrip(),
        "Graph": graph_text(built.graph),
        "Placement": plan_table(built.workers),
    }
    return "\n\n".join(f"# {title}\n{text}" for title, text in sections.items())


def train(built: Pipeline, topology: Topology) -> int:
    from controllers.node import NodeController
    from flowrl.pipeline import controller_settings, worker_settings
    from flowrl.record import run_directory
    from flowrl.record.display import Display
    from flowrl.record.recorder import Recorder

    recipe = built.recipe
    directory, recipe_path = run_directory.create(recipe, topology.node)
    ensure_model(Path(recipe.model.path), recipe_path)
    with Display(recipe.run.name, recipe.train.steps, is_shown=topology.node == 0) as display:
        recorder = Recorder(recipe, directory, topology.node, display)
        controller = NodeController(
            topology,
            built.graph,
            built.workers,
            controller_settings(built, directory),
            worker_settings(built, recipe_path),
            recorder.observers(),
        )
        code = controller.run()
        summary = recorder.close()
    if topology.node == 0:
        from flowrl.report.run_report import print_report

        print_report(directory, summary)
    return code


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
