"""`flowrl graph RECIPE`: the stages and their edges, as text with the placement, or as Mermaid. Starts nothing."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings that replace the recipe's")
    parser.add_argument("--mermaid", action="store_true", help="print a Mermaid diagram")
    parser.add_argument("--nodes", type=int, default=1, help="how many nodes there would be (1)")


def run(arguments: argparse.Namespace) -> int:
    from controllers.drawing import graph_mermaid, graph_text, placement_text
    from flowrl import config, pipeline

    built = pipeline.build(config.load(arguments.recipe, arguments.overrides), arguments.nodes)
    if arguments.mermaid:
        print(graph_mermaid(built.graph))
    else:
        print(graph_text(built.graph), placement_text(built.workers, "rollout", "train"), sep="\n\n")
    return 0
