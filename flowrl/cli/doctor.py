"""`flowrl doctor RECIPE`: what a run will need, what this machine has, what will not fit. Starts nothing."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings that replace the recipe's")
    parser.add_argument("--nodes", type=int, default=1, help="that the run will have (1)")
    parser.add_argument("--nodes-here", type=int, default=1, help="of them on this machine (1)")


def run(arguments: argparse.Namespace) -> int:
    from flowrl import config, pipeline
    from flowrl.doctor.examine import examine

    if not 1 <= arguments.nodes_here <= arguments.nodes:
        raise ValueError(f"--nodes-here: {arguments.nodes_here}; must be from 1 to --nodes, {arguments.nodes}")
    recipe = config.load(arguments.recipe, arguments.overrides)
    found = examine(pipeline.build(recipe, arguments.nodes), 0, arguments.nodes, arguments.nodes_here)
    for title, lines in found.sections:
        print(f"# {title}")
        print("\n".join(lines), end="\n\n")
    for doubt in found.doubts:
        print(f"may be short: {doubt}")
    for problem in found.problems:
        print(f"WILL NOT FIT: {problem}")
    if not found.problems:
        print("this machine has what the run needs, as far as can be told beforehand")
    return 1 if found.problems else 0
