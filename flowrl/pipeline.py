"""From a recipe to what the controllers run: stages, pools, worker settings. The only file that wires things together.

Imports nothing heavy: a recipe is checked, drawn and placed without torch. Executors are named by dotted paths.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from transfer_queue.config import ConsumerSpec

from controllers.graph import Graph
from controllers.placement import Pool, WorkerPlan, plan
from controllers.stage import Kind, Stage, Unit
from flowrl.config import PoolConfig, Recipe

ROLLOUT_COLUMNS = (
    "data_index",
    "prompt_tokens",
    "response_tokens",
    "response_mask",
    "rollout_logprobs",
    "token_versions",
    "finish_reason",
)

TRAIN_COLUMNS = (
    "prompt_tokens",
    "response_tokens",
    "response_mask",
    "rollout_logprobs",
    "token_versions",
    "finish_reason",
    "reward",
    "advantage",
)


@dataclass(frozen=True)
class Pipeline:
    """What one recipe comes to on `num_nodes` nodes."""

    recipe: Recipe
    graph: Graph
    workers: tuple[WorkerPlan, ...]

    @property
    def batch_rows(self) -> int:
        return self.recipe.train.batch_groups * self.recipe.rollout.group_size


def build(recipe: Recipe, num_nodes: int) -> Pipeline:
    """Raises ValueError for a graph or a placement that cannot be."""
    graph = Graph.of(stages(recipe))
    return Pipeline(recipe, graph, plan(graph, pools(recipe), num_nodes))


def stages(recipe: Recipe) -> list[Stage]:
    """The default graph of the algorithm, and what the recipe adds or replaces by name."""
    declared = {stage.name: stage for stage in _default_stages(recipe)}
    for name, given in recipe.stages.items():
        declared[name] = Stage(
            name=name,
            run=given.run,
            unit=Unit(given.unit),
            reads=tuple(given.reads),
            optional=tuple(given.optional),
            writes=tuple(given.writes),
            pool=given.pool,
            worker="stages" if given.pool == "cpu" else f"stages-{given.pool}",
            settings=given.settings,
        )
    return list(declared.values())


def _default_stages(recipe: Recipe) -> list[Stage]:
    found = [
        Stage(
            name="rollout",
            run="flowrl.stages.rollout:main",
            kind=Kind.DRIVER,
            unit=Unit.GROUP,
            writes=ROLLOUT_COLUMNS,
            pool="rollout",
        ),
        Stage(
            name="reward",
            run="flowrl.stages.reward:Reward",
            reads=("data_index", "response_tokens", "token_versions"),
            writes=("reward",),
            worker="stages",
        ),
        Stage(
            name="advantage",
            run="flowrl.stages.advantage:GroupAdvantage",
            unit=Unit.GROUP,
            reads=("reward",),
            writes=("advantage",),
            worker="stages",
        ),
        Stage(
            name="train",
            run="flowrl.stages.train:main",
            kind=Kind.DRIVER,
            unit=Unit.GROUP,
            reads=TRAIN_COLUMNS,
            pool="train",
            after=("warm_start",) if recipe.warm_start else (),
        ),
    ]
    if recipe.warm_start is not None:
        found.append(
            Stage(
                name="warm_start",
                run="flowrl.stages.train:main",
                kind=Kind.DRIVER,
                unit=Unit.BATCH,
                pool="train",
                worker="train",
            )
        )
    if recipe.eval is not None:
        found.append(Stage(name="evaluate", run="flowrl.stages.evaluate:main", kind=Kind.DRIVER, pool="eval"))
    return found


def pools(recipe: Recipe) -> list[Pool]:
    """The four that exist, evaluation on node 0 only, and what the recipe says of them or adds."""
    given: dict[str, PoolConfig] = {
        "rollout": PoolConfig(),
        "train": PoolConfig(),
        "cpu": PoolConfig(),
        "eval": PoolConfig(nodes=[0]),
        **recipe.pools,
    }
    return [
        Pool(
            name=name,
            nodes=tuple(pool.nodes),
            workers=pool.workers,
            threads=pool.threads,
            devices=tuple(pool.devices),
        )
        for name, pool in given.items()
    ]


def consumers(graph: Graph) -> dict[str, ConsumerSpec]:
    """What each reading stage asks of the queue. The stage named `train` takes under the staleness rule."""
    return {
        stage.name: ConsumerSpec(
            columns=stage.reads,
            optional=stage.optional,
            partition=stage.partition,
            unit="row" if stage.unit is Unit.ROW else "group",
            training=stage.name == "train",
        )
        for stage in graph.stages
        if stage.reads
    }


def worker_settings(pipeline: Pipeline, recipe_path: str) -> dict[str, dict[str, Any]]:
    """How each kind of worker is started: its target, what it is given, whether it comes back after a death.

    Engines, stages and evaluation come back; a rank of the trainer's world does not.
    """
    payload = {"recipe": recipe_path}
    settings: dict[str, dict[str, Any]] = {}
    for stage in pipeline.graph.stages:
        if stage.kind is Kind.DRIVER:
            restart = "never" if stage.worker == "train" else "always"
            settings[stage.worker] = {"target": stage.run, "payload": payload, "restart": restart}
        else:
            mapped = settings.setdefault(
                stage.worker, {"target": "controllers.executor:run_stages", "restart": "always", "payload": payload}
            )
            declared = {**dataclasses.asdict(stage), "unit": stage.unit.value, "kind": stage.kind.value}
            mapped["payload"] = {**mapped["payload"], "stages": [*mapped["payload"].get("stages", ()), declared]}
    return settings
