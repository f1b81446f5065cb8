"""Where published weights lie, and on which nodes: on each node's tmpfs, or in a directory that all nodes see.

Imports no torch: a recipe is placed without it.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from controllers.placement import WorkerPlan
from flowrl.config import LoRAConfig, Recipe

EVALUATION_PIN = "evaluate"


@dataclass(frozen=True)
class Route:
    """From whom to whom weights go. trainer: the nodes whose ranks write them, in the order of the ranks; serving:
    those with engines or evaluation."""

    trainer: tuple[int, ...]
    serving: tuple[int, ...]

    @classmethod
    def of(cls, workers: Sequence[WorkerPlan], recipe: Recipe) -> Route:
        trainer = {plan.node for plan in workers if plan.worker == "train"}
        serving = {plan.node for plan in workers if plan.worker in (*recipe.rollout_stages, "evaluate")}
        return cls(tuple(sorted(trainer)), tuple(sorted(serving)))

    @classmethod
    def from_payload(cls, payload: dict[str, Any]) -> Route:
        return cls(**{name: tuple(nodes) for name, nodes in payload["route"].items()})

    def payload(self) -> dict[str, Any]:
        return {"route": asdict(self)}

    @property
    def needs_relays(self) -> bool:
        """Whether a node serves a version that its own ranks do not write whole."""
        return len(self.trainer) > 1 or not set(self.serving) <= set(self.trainer)

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted({*self.trainer, *self.serving}))


def weights_root(recipe: Recipe, session_dir: Path) -> Path:
    """What a node's engines read from."""
    return versions_on_disk(recipe) or session_dir / "weights"


def versions_on_disk(recipe: Recipe) -> Path | None:
    """The directory of its versions that all nodes see, and that outlives a run."""
    return None if recipe.weights.dir is None else Path(recipe.weights.dir) / recipe.run.name


def written_root(recipe: Recipe, session_dir: Path, route: Route) -> Path:
    """What trainer ranks write to: where several nodes have some, the node's part of each version, for its relay."""
    is_partial = recipe.weights.transport == "shared_memory" and len(route.trainer) > 1
    return session_dir / "weights-written" if is_partial else weights_root(recipe, session_dir)


def is_evaluated(recipe: Recipe, version: int) -> bool:
    evaluation, last = recipe.eval, recipe.train.steps
    return evaluation is not None and (version % evaluation.every == 0 or version == last)


def pin_of(recipe: Recipe, version: int, node: int) -> str:
    """The name under which `version` is to be pinned on `node`, if it is evaluated there; else empty."""
    pool = recipe.pools.get("eval")
    nodes = [0] if pool is None else pool.nodes
    is_here = not nodes or node in nodes or recipe.weights.transport == "disk"
    return EVALUATION_PIN if is_here and is_evaluated(recipe, version) else ""


def publishes_adapters(recipe: Recipe) -> bool:
    """Whether versions are adapters alone, which embedded engines merge for themselves, or whole models. SGLang is
    served merged weights; straight into engines go the tensors that they have."""
    return (
        recipe.model.lora is not None
        and all(recipe.producer(name).rollout.engine == "embedded" for name in recipe.rollout_stages)
        and recipe.weights.transport != "collective"
    )


def version_bytes(recipe: Recipe) -> int:
    """Size of one published version. 0 where there is no checkpoint yet."""
    model_dir = Path(recipe.model.path)
    if recipe.model.lora is None or not publishes_adapters(recipe):
        return serving_bytes(model_dir, recipe.model.dtype)
    return 4 * adapter_elements(model_dir, recipe.model.lora)


def adapter_elements(model_dir: Path, lora: LoRAConfig) -> int:
    """An upper bound, from all matrices of the layers that have a wanted name. 0 where there is no checkpoint yet."""
    elements = 0
    for name, shape in _shapes(model_dir):
        target = name.removesuffix(".weight").rpartition(".")[2]
        if len(shape) == 2 and re.search(r"\.\d+\.", name) and (lora.targets is None or target in lora.targets):
            elements += lora.rank * sum(shape)
    return elements


def serving_bytes(model_dir: Path, dtype: str) -> int:
    """Size of the whole model as it is served, from the headers of the checkpoint's files. 0 where there are none."""
    return sum(math.prod(shape) for _, shape in _shapes(model_dir)) * (4 if dtype == "float32" else 2)


def _shapes(model_dir: Path) -> Iterator[tuple[str, list[int]]]:
    for file in model_dir.glob("*.safetensors"):
        with file.open("rb") as opened:
            (header_bytes,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(header_bytes))
        yield from ((name, entry["shape"]) for name, entry in header.items() if name != "__metadata__")
