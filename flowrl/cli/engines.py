"""`flowrl engines RUN COUNT [--node N] [--stage NAME]`: engines join a run that goes on, or leave it."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, help="its directory")
    parser.add_argument("count", type=int, help="how many engines the node is to have, until this is said anew")
    parser.add_argument("--node", type=int, default=0, help="which node (0)")
    parser.add_argument("--stage", default="rollout", help="whose engines: rollout's, or those of a producer (rollout)")


def run(arguments: argparse.Namespace) -> int:
    from controllers.wanted import want
    from flowrl import config, pipeline
    from flowrl.record.run_directory import recipe_name

    recipe_path = arguments.run / recipe_name(arguments.node)
    if not recipe_path.is_file():
        raise ValueError(
            f"run: {str(arguments.run)!r}; has no {recipe_path.name}, so no run of this name, or not that node"
        )
    if (arguments.run / "model").is_dir():
        raise ValueError(f"run: {str(arguments.run)!r}; has trained to its end, so engines have nothing more to do")
    recipe = config.load(recipe_path)
    named = [node for pool in recipe.pools.values() for node in pool.nodes]
    built = pipeline.build(recipe, 1 + max(arguments.node, *named, 0))
    if arguments.stage not in recipe.rollout_stages:
        raise ValueError(f"stage: {arguments.stage!r}; must be one of {', '.join(recipe.rollout_stages)}")
    pool = built.graph.stage(arguments.stage).pool
    if not any((plan.worker, plan.node) == (arguments.stage, arguments.node) for plan in built.workers):
        raise ValueError(f"node: {arguments.node}; pools.{pool} has {recipe.pools[pool].nodes}")
    most = pipeline.most_engines(built, arguments.stage)
    if not most:
        raise ValueError(
            f"count: {arguments.count}; engines cannot join or leave this run, which hands over whole shares of an "
            "update, sends weights straight into engines, or has some take turns with the trainer at its devices"
        )
    if not 0 <= arguments.count <= most:
        raise ValueError(f"count: {arguments.count}; must be from 0 to {most}, the devices that pools.{pool} names")
    want(arguments.run, arguments.stage, arguments.node, arguments.count)
    print(f"node {arguments.node} is to have {arguments.count} engines of {arguments.stage}; it looks once a second")
    return 0
