"""`flowrl init-model RECIPE`: makes the small model and the tokenizer that the recipe's `model.init` describes."""

from __future__ import annotations

import argparse
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", help="a YAML recipe with model.init")
    parser.add_argument("overrides", nargs="*", metavar="field.name=value", help="settings that replace the recipe's")


def run(arguments: argparse.Namespace) -> int:
    from flowrl import config
    from flowrl.data.datasets import load_splits
    from flowrl.model_init import create_model

    recipe = config.load(arguments.recipe, arguments.overrides)
    if recipe.model.init is None:
        raise ValueError("model.init: missing; it says what to make")
    path = Path(recipe.model.path)
    if path.exists():
        raise ValueError(f"model.path: {str(path)!r}; exists already, and models are never overwritten")
    splits = load_splits(recipe.data, recipe.eval)
    texts = [text for example in splits.train for text in (example.text, example.demonstration or "")]
    create_model(path, recipe.model.init, texts)
    print(f"made {path}")
    return 0
