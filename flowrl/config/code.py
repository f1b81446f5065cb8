"""What of a recipe is code of the user's, and whether it is there: looked up in its source, never run.

So a wrong name is refused before anything starts, on every node, though nothing heavy is imported for it.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

from flowrl.config.recipe import Recipe


def refuse_missing_code(recipe: Recipe) -> None:
    """Raises ValueError naming the field of a file, module or name that is not there, and of a class that is no
    stage."""
    for field, path in code_of(recipe):
        module, _, name = path.rpartition(":")
        source = _source(field, path, module)
        if source is not None:
            tree = _parsed(field, path, source)
            _refuse_missing_name(field, path, source, tree, name)
            if field.startswith("stages."):
                _refuse_no_stage(field, path, tree, name)


def code_of(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(field, dotted path) of everything that a recipe names by one."""
    rollout, algorithm = recipe.rollout, recipe.algorithm
    yield from ((f"stages.{name}.run", stage.run) for name, stage in recipe.stages.items())
    yield from (("rollout.tools", tool) for tool in rollout.tools if ":" in tool)
    given = {
        "rollout.episode": rollout.episode,
        "rollout.tool_parser": rollout.tool_parser,
        "rollout.environment.path": rollout.environment.path if rollout.environment is not None else None,
        "reward.path": recipe.reward.path,
        "algorithm.advantage": algorithm.advantage,
        "algorithm.loss": algorithm.loss,
    }
    yield from ((field, path) for field, path in given.items() if path is not None and ":" in path)


def _source(field: str, path: str, module: str) -> Path | None:
    """None for a module that is there and has no source in Python."""
    if module.endswith(".py"):
        file = Path(module)
        if not file.is_file():
            raise ValueError(f"{field}: {path!r}; no such file as {str(file.resolve())!r}")
        return file
    try:
        spec = importlib.util.find_spec(module)
    except ModuleNotFoundError as error:
        raise ValueError(f"{field}: {path!r}; no module named {error.name!r}") from None
    if spec is None:
        raise ValueError(f"{field}: {path!r}; no module named {module!r}")
    return Path(spec.origin) if spec.origin is not None and spec.origin.endswith(".py") else None


def _parsed(field: str, path: str, source: Path) -> ast.Module:
    try:
        return ast.parse(source.read_bytes(), str(source))
    except SyntaxError as error:
        raise ValueError(f"{field}: {path!r}; line {error.lineno} of {source} is no Python: {error.msg}") from error


def _refuse_missing_name(field: str, path: str, source: Path, tree: ast.Module, name: str) -> None:
    names = set(_names(tree))
    if name in names or names & {"*", "__getattr__"}:
        return
    near = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{field}: {path!r}; {source} has no {name!r}{hint}")


def _refuse_no_stage(field: str, path: str, tree: ast.Module, name: str) -> None:
    """As far as its source says so: not of a class that has bases, decorators or a metaclass, or makes its attributes
    or itself in another way."""
    defined = [part for part in tree.body if isinstance(part, ast.ClassDef) and part.name == name]
    if not defined:
        return
    found, names = defined[-1], set(_names(defined[-1]))
    if found.bases or found.keywords or found.decorator_list or names & {"__getattr__", "__getattribute__", "__new__"}:
        return
    stored = {part.attr for part in ast.walk(found) if isinstance(part, ast.Attribute)}
    if "process" not in names | stored:
        raise ValueError(f"{field}: {path!r}; the class has no process(self, rows), so it is no stage")
    inits = [part for part in found.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    takes_both = not inits or inits[-1].decorator_list or _takes(inits[-1].args, 3)
    if "__init__" not in names or not takes_both:
        raise ValueError(f"{field}: {path!r}; a stage's class has an __init__(self, context, settings)")


def _takes(given: ast.arguments, count: int) -> bool:
    """Whether a function can be called with so many arguments, by position."""
    most = len(given.posonlyargs) + len(given.args)
    is_enough = given.vararg is not None or count <= most
    return is_enough and most - len(given.defaults) <= count and None not in given.kw_defaults


def _names(node: ast.AST) -> Iterator[str]:
    """What running the module may bind in it: nothing inside functions and classes."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield child.name
        elif isinstance(child, ast.alias):
            yield (child.asname or child.name).partition(".")[0]
        elif isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
            yield child.id
        elif not isinstance(child, ast.Lambda | ast.GeneratorExp | ast.ListComp | ast.SetComp | ast.DictComp):
            yield from _names(child)
