"""The directory a run leaves behind: made here, once; never written over."""

from __future__ import annotations

from pathlib import Path

from flowrl.config import Recipe, to_yaml
from flowrl.weights.place import versions_on_disk
from flowrl.weights.store import VERSION_NAME


def create(recipe: Recipe, node: int) -> tuple[Path, Path]:
    """Makes `runs/<name>` and writes the resolved recipe into it. Returns the directory and the recipe's path.

    Node 0 refuses a directory that holds a run already, and a `weights.dir` that holds versions of another; other nodes
    that share the disk write beside it.
    """
    directory = Path(recipe.run.dir) / recipe.run.name
    path = directory / recipe_name(node)
    if node == 0 and not path.exists():
        refuse_versions_of_another(recipe)
    (directory / "logs").mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_yaml(recipe))
    except FileExistsError:
        raise ValueError(
            f"run.name: {recipe.run.name!r}; {directory} holds a run already, and runs are never overwritten "
            "(choose another run.name, move the directory away, or go on with it by --resume)"
        ) from None
    return directory.resolve(), path.resolve()


def refuse_versions_of_another(recipe: Recipe) -> None:
    """For a run that has published nothing there. Beside them its first versions would be the oldest, and go at
    once."""
    root = versions_on_disk(recipe)
    if root is not None and any(
        VERSION_NAME.fullmatch(path.name) for path in (*root.glob("v*"), *root.glob("pins/*/v*"))
    ):
        raise ValueError(
            f"weights.dir: {str(root)!r} holds versions of another run of this name (choose another run.name, or "
            "move the directory away)"
        )


def recipe_name(node: int) -> str:
    """Of the resolved recipe as the node has it."""
    return "recipe.yaml" if node == 0 else f"recipe.node{node}.yaml"
