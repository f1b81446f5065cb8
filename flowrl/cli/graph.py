"""`flowrl graph RECIPE`: the stages and their edges, as text or Mermaid. Starts nothing."""

from __future__ import annotations

import argparse


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings that replace the recipe's")
    parser.add_argument("--mermaid", action="store_true", help="print a Mermaid diagram")


def run(arguments: argparse.Namespace) -> int:
    from controllers.drawing import graph_mermaid, graph_text
    from flowrl import config, pipeline

    graph = pipeline.build(config.load(arguments.recipe, arguments.overrides), num_nodes=1).graph
    print(graph_mermaid(graph) if arguments.mermaid else graph_text(graph))
    return 0
