"""From YAML and dotted overrides to a `Recipe`, once. Nothing beyond this file sees an OmegaConf object."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from flowrl.config.code import refuse_missing_code
from flowrl.config.presets import preset
from flowrl.config.recipe import Recipe


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a YAML recipe, applies dotted overrides (`staleness.max=2`), and checks it.

    Raises ValueError, naming field, value and rule.
    """
    given = _read(Path(path))
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"override: {override!r}; must read field.name=value")
    merged = OmegaConf.merge(given, OmegaConf.from_dotlist(list(overrides)))
    assert isinstance(merged, DictConfig)
    given = merged
    _check_keys(given, Recipe, "")
    try:
        complete = OmegaConf.merge(OmegaConf.structured(Recipe), _preset(given), given)
        recipe = OmegaConf.to_object(complete)
    except OmegaConfBaseException as error:
        raise ValueError(_readable(error)) from error
    assert isinstance(recipe, Recipe)
    _refuse_missing_paths(recipe)
    _refuse_endless_responses(recipe)
    refuse_missing_code(recipe)
    return recipe


def _read(path: Path, seen: tuple[Path, ...] = ()) -> DictConfig:
    """The file's mapping over that of the recipe it names as `base`, a path beside its own."""
    if not path.is_file():
        raise ValueError(f"recipe: {str(path)!r}; no such file")
    if path.resolve() in seen:
        raise ValueError(f"base: {str(path)!r}; a recipe cannot be its own base")
    try:
        given = OmegaConf.load(path)
    except Exception as error:  # the YAML parser has several trees of exceptions
        raise ValueError(f"recipe: {str(path)!r} is not YAML: {error}") from error
    if not isinstance(given, DictConfig):
        raise ValueError(f"recipe: {str(path)!r} holds a {type(given).__name__}; it must be a mapping")
    base = given.pop("base", None)
    if base is None:
        return given
    merged = OmegaConf.merge(_read(path.parent / str(base), (*seen, path.resolve())), given)
    assert isinstance(merged, DictConfig)
    return merged


def to_yaml(recipe: Recipe) -> str:
    """The resolved recipe, every default written out; `load` reads it back to an equal one."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _preset(given: DictConfig) -> dict[str, Any]:
    """What the algorithm's name says of the fields that the recipe leaves out."""
    container = OmegaConf.to_container(given.get("algorithm") or OmegaConf.create({}))
    assert isinstance(container, dict)
    algorithm = {str(name): value for name, value in container.items()}
    return {"algorithm": preset(str(algorithm.get("name", "grpo")), algorithm)}


def _check_keys(given: DictConfig, kind: type, prefix: str) -> None:
    """Walks the mapping beside the dataclasses: unknown keys with the nearest known one, and what is missing."""
    hints = typing.get_type_hints(kind)
    for key in map(str, given):
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known here: {', '.join(hints)}"
            raise ValueError(f"{name}: {_plain(given, key)!r}; no such field ({hint})")
        _check_inside(given, key, hints[key], name)
    for entry in dataclasses.fields(kind):
        has_default = entry.default is not dataclasses.MISSING or entry.default_factory is not dataclasses.MISSING
        if not has_default and entry.name not in given:
            raise ValueError(f"{prefix}{entry.name}: missing; a recipe must give it")


def _check_inside(given: DictConfig, key: str, hint: Any, name: str) -> None:
    node = given._get_node(key)
    kinds = typing.get_args(hint) or (hint,)
    inner = [kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)]
    if not inner or OmegaConf.is_missing(given, key) or _plain(given, key) is None:
        return
    if not isinstance(node, DictConfig):
        raise ValueError(f"{name}: {_plain(given, key)!r}; must be a mapping")
    if typing.get_origin(hint) is not dict:
        _check_keys(node, inner[0], f"{name}.")
        return
    for entry in map(str, node):
        _check_inside(node, entry, inner[0], f"{name}.{entry}")


def _plain(given: DictConfig, key: str) -> Any:
    container = OmegaConf.to_container(given)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items()}[key]


def _refuse_missing_paths(recipe: Recipe) -> None:
    paths = {"data.path": recipe.data.path}
    if recipe.eval is not None:
        paths["eval.path"] = recipe.eval.path
    if recipe.model.init is None:
        paths["model.path"] = recipe.model.path
    for name, value in paths.items():
        if value is not None and not Path(value).exists():
            raise ValueError(f"{name}: {value!r}; no such file or directory")


def _refuse_endless_responses(recipe: Recipe) -> None:
    """A response and its prompt must fit into what the model takes, as far as that is written down."""
    config = Path(recipe.model.path) / "config.json"
    context: Any = None
    if config.is_file():
        with suppress(ValueError):  # whoever loads the model says what is wrong with it
            context = json.loads(config.read_bytes()).get("max_position_embeddings")
    else:
        context = recipe.model.init.max_tokens if recipe.model.init is not None else None
    if isinstance(context, int) and recipe.rollout.max_tokens >= context:
        raise ValueError(
            f"rollout.max_tokens: {recipe.rollout.max_tokens}; the model takes {context} tokens, of prompt and response"
            f" together ({config if config.is_file() else 'model.init.max_tokens'})"
        )


def _readable(error: OmegaConfBaseException) -> str:
    field_name = error.full_key or "recipe"
    first_line = str(error.msg or error).splitlines()[0]
    return f"{field_name}: {first_line}"
