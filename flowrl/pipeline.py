"""From a recipe to what the controllers run: stages, pools, worker settings. The only file that wires things together.

Imports nothing heavy: a recipe is checked, drawn and placed without torch. Executors are named by dotted paths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from controllers.graph import Graph
from controllers.network import interface_address
from controllers.placement import HOST_DEVICE, Pool, WorkerPlan, plan, sharing
from controllers.settings import EXECUTOR_TARGET, ControllerSettings, QueueSettings, WorkerSettings
from controllers.stage import Kind, Stage, Unit
from controllers.supervisor import Limits
from flowrl.columns import COLUMNS
from flowrl.config import PoolConfig, Recipe, to_yaml
from flowrl.config.recipe import (
    ROLLOUT,
    hands_over_batches,
    needs_segments,
    refuse_uneven_shares,
    refuse_what_cannot_alternate,
    takes_episode_reward,
)
from flowrl.record.lives import Life
from flowrl.rollout.sglang.arguments import gpus_of_servers
from flowrl.stages.turns import SHARING
from flowrl.weights.place import Route, version_bytes

MANY_ENGINES = 1024

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


RELAY_STAGE = Stage(name="relay", run="flowrl.stages.relay:main", kind=Kind.DRIVER, pool="relay")


@dataclass(frozen=True)
class Pipeline:
    """What one recipe comes to on `num_nodes` nodes."""

    recipe: Recipe
    graph: Graph
    workers: tuple[WorkerPlan, ...]


def build(recipe: Recipe, num_nodes: int) -> Pipeline:
    """Raises ValueError for a graph or a placement that cannot be."""
    graph = Graph.of(stages(recipe))
    known = {pool.name for pool in pools(recipe)}
    for name in recipe.producers:
        if graph.stage(name).pool not in known:
            raise ValueError(f"producers.{name}.pool: {graph.stage(name).pool!r}; the pools are {sorted(known)}")
    workers = plan(graph, pools(recipe), num_nodes)
    route = Route.of(workers, recipe)
    if recipe.weights.transport == "shared_memory" and route.needs_relays:
        graph = Graph.of([*stages(recipe), RELAY_STAGE])
        workers = plan(graph, [*pools(recipe), Pool(name="relay", nodes=route.nodes)], num_nodes)
    refuse_evaluation_elsewhere(recipe, workers)
    refuse_uneven_shares(recipe, sum(worker.worker == ROLLOUT for worker in workers))
    refuse_uneven_servers(recipe, workers)
    if sharing(workers, ROLLOUT, "train"):
        refuse_what_cannot_alternate(recipe)
    for name in recipe.producers:
        if shared := sharing(workers, name, "train"):
            raise ValueError(
                f"producers.{name}.pool: {sorted(shared)} share devices; only rollout's engines take turns"
            )
    return Pipeline(recipe, graph, workers)


def refuse_uneven_servers(recipe: Recipe, workers: Sequence[WorkerPlan]) -> None:
    """Raises ValueError where the GPUs of a worker do not divide among its SGLang servers."""
    for worker in workers:
        rollout = recipe.producer(worker.worker).rollout
        if worker.worker in recipe.rollout_stages and rollout.engine == "sglang" and not rollout.urls:
            gpus_of_servers(worker.devices, rollout.servers, rollout.server_args)


def refuse_evaluation_elsewhere(recipe: Recipe, workers: Sequence[WorkerPlan]) -> None:
    """Evaluation takes directories. Where engines are sent weights without, one node's memory has to do."""
    nodes = {plan.node for plan in workers if plan.worker in ("train", "evaluate")}
    if recipe.weights.transport == "collective" and recipe.eval is not None and len(nodes) > 1:
        raise ValueError(
            f"weights.transport: 'collective'; evaluation reads the trainer's node's memory, and they are on nodes "
            f"{sorted(nodes)}: set pools.train.nodes and pools.eval.nodes to one and the same, or eval to null"
        )


def stages(recipe: Recipe) -> list[Stage]:
    """The default graph of the algorithm, and what the recipe adds or replaces by name."""
    declared = {stage.name: stage for stage in _default_stages(recipe)}
    for name, given in recipe.stages.items():
        worker = "stages" if given.pool == "cpu" else f"stages-{given.pool}"
        is_hosted = given.unit == Unit.BATCH.value
        if is_hosted and given.pool != "cpu":
            raise ValueError(f"stages.{name}.pool: {given.pool!r}; a stage with unit 'batch' runs in train's processes")
        declared[name] = Stage(
            name=name,
            run=given.run,
            unit=Unit(given.unit),
            reads=tuple(given.reads),
            optional=tuple(given.optional),
            writes=tuple(given.writes),
            one_value=tuple(name for name in given.writes if name in COLUMNS and COLUMNS[name].per == "row"),
            pool="train" if is_hosted else given.pool,
            worker="train" if is_hosted else worker,
            settings=given.settings,
        )
    return list(declared.values())


def _default_stages(recipe: Recipe) -> list[Stage]:
    found = [
        *(_rollout_stage(recipe, name) for name in recipe.rollout_stages),
        Stage(
            name="reward",
            run="flowrl.stages.reward:Reward",
            reads=_reward_reads(recipe),
            writes=_reward_writes(recipe),
            worker="stages",
        ),
        Stage(
            name="train",
            run="flowrl.stages.train:main",
            kind=Kind.DRIVER,
            unit=Unit.BATCH,
            reads=_train_columns(recipe),
            optional=("segment_proximal_logprobs",) if needs_segments(recipe) else (),
            pool="train",
            after=("warm_start",) if recipe.warm_start else (),
        ),
    ]
    if not recipe.algorithm.estimates_in_trainer:
        found.append(
            Stage(
                name="advantage",
                run="flowrl.stages.advantage:GroupAdvantage",
                unit=Unit.GROUP,
                reads=_advantage_columns(recipe),
                writes=("advantage",),
                worker="stages",
            )
        )
    if needs_segments(recipe):
        found.append(
            Stage(
                name="proximal",
                run="flowrl.stages.proximal:main",
                kind=Kind.DRIVER,
                reads=("prompt_tokens", "response_tokens", "response_mask", "rollout_logprobs", "token_versions"),
                writes=("segment_proximal_logprobs",),
                pool="proximal",
            )
        )
    if recipe.rollout.filter_tied:
        found.append(
            Stage(
                name="tied",
                run="flowrl.stages.tied:TiedGroups",
                unit=Unit.GROUP,
                reads=("reward",),
                writes=("is_untied",),
                worker="stages",
            )
        )
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


def _rollout_stage(recipe: Recipe, name: str) -> Stage:
    given = recipe.producers.get(name)
    return Stage(
        name=name,
        run="flowrl.stages.rollout:main",
        kind=Kind.DRIVER,
        unit=Unit.GROUP,
        writes=(*ROLLOUT_COLUMNS, *_episode_columns(recipe), *_greedy_columns(recipe), *_expert_columns(recipe)),
        pool=name if given is None or given.pool is None else given.pool,
    )


def _episode_columns(recipe: Recipe) -> tuple[str, ...]:
    return ("episode_reward",) if takes_episode_reward(recipe) else ()


def _greedy_columns(recipe: Recipe) -> tuple[str, ...]:
    """What rollout says of a prompt's greedy response: its tokens, for the reward; its score, if episodes give one."""
    if not recipe.algorithm.has_greedy_baseline:
        return ()
    return ("baseline",) if takes_episode_reward(recipe) else ("greedy_tokens",)


def _reward_reads(recipe: Recipe) -> tuple[str, ...]:
    greedy = tuple(name for name in _greedy_columns(recipe) if name == "greedy_tokens")
    return ("data_index", "response_tokens", "response_mask", "token_versions", *_episode_columns(recipe), *greedy)


def _reward_writes(recipe: Recipe) -> tuple[str, ...]:
    has_greedy = "greedy_tokens" in _greedy_columns(recipe)
    return ("reward", *(("baseline",) if has_greedy else ()), *(("scores",) if recipe.algorithm.score_weights else ()))


def _estimator_columns(recipe: Recipe) -> tuple[str, ...]:
    """What the advantage is made of beside reward and length."""
    found = (("baseline", recipe.algorithm.has_greedy_baseline), ("scores", bool(recipe.algorithm.score_weights)))
    return tuple(name for name, is_needed in found if is_needed) + _filter_columns(recipe)


def _expert_columns(recipe: Recipe) -> tuple[str, ...]:
    return ("routed_experts",) if recipe.rollout.routed_experts else ()


def _train_columns(recipe: Recipe) -> tuple[str, ...]:
    if recipe.algorithm.estimates_in_trainer:
        return tuple(name for name in TRAIN_COLUMNS if name != "advantage") + _estimator_columns(recipe)
    return TRAIN_COLUMNS + _filter_columns(recipe)


def _advantage_columns(recipe: Recipe) -> tuple[str, ...]:
    """Lengths, where the score or the baseline depends on them, come from the mask."""
    needs_length = recipe.algorithm.overlong_buffer > 0 or recipe.algorithm.advantage == "opo"
    return ("reward", *(("response_mask",) if needs_length else ()), *_estimator_columns(recipe))


def _filter_columns(recipe: Recipe) -> tuple[str, ...]:
    """Read by whoever comes next, so that it waits for the filter; the values say nothing."""
    return ("is_untied",) if recipe.rollout.filter_tied else ()


def pools(recipe: Recipe) -> list[Pool]:
    """Those that exist, evaluation on node 0 only, and what the recipe says of them or adds."""
    given: dict[str, PoolConfig] = {
        "rollout": PoolConfig(),
        "train": PoolConfig(),
        "cpu": PoolConfig(),
        "eval": PoolConfig(nodes=[0]),
        "proximal": PoolConfig(),
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


def worker_settings(built: Pipeline, recipe_path: Path) -> dict[str, WorkerSettings]:
    """How each kind of worker is started, what it is given, and whether it comes back after a death: engines, stages
    and evaluation do; a rank of the trainer's world does not, because the world dies with it."""
    settings: dict[str, WorkerSettings] = {}
    route = Route.of(built.workers, built.recipe)
    turns = sharing(built.workers, ROLLOUT, "train")
    peers = {
        "engines": [plan.name for plan in built.workers if plan.worker in built.recipe.rollout_stages],
        "trainer_ranks": sum(plan.worker == "train" for plan in built.workers),
    }
    for worker, members in built.graph.workers().items():
        payload: dict[str, Any] = {"recipe": str(recipe_path), SHARING: turns} | route.payload() | peers
        target = members[0].run
        payload["stages"] = [msgspec.to_builtins(stage) for stage in members if stage.kind is Kind.MAPPED]
        if members[0].kind is Kind.MAPPED:
            target = EXECUTOR_TARGET
        if worker in (RELAY_STAGE.name, *built.recipe.rollout_stages):
            payload["address"] = interface_address(built.recipe.network.interface)
        restart: Literal["always", "never"] = "never" if worker == "train" else "always"
        settings[worker] = {"target": target, "payload": payload, "restart": restart}
    for name in built.recipe.rollout_stages:
        settings[name]["most"] = most_engines(built, name)
    return settings


def most_engines(built: Pipeline, stage: str = ROLLOUT) -> int:
    """That a node may have: as many as one likes on the host, one a device elsewhere. 0 where they cannot join or leave
    a run: shares of an update are settled from its start, and so are who takes turns and to whom ranks send weights."""
    is_collective = built.recipe.weights.transport == "collective"
    if is_collective or hands_over_batches(built.recipe) or sharing(built.workers, ROLLOUT, "train"):
        return 0
    pool = next(pool for pool in pools(built.recipe) if pool.name == built.graph.stage(stage).pool)
    return MANY_ENGINES if pool.devices == (HOST_DEVICE,) else pool.workers


def controller_settings(built: Pipeline, run_dir: Path, life: Life) -> ControllerSettings:
    """Raises ValueError for an interface that this machine does not have."""
    recipe = built.recipe
    route = Route.of(built.workers, recipe)
    optional: dict[str, Any] = {}
    if recipe.run.session_dir is not None:
        optional["session_root"] = Path(recipe.run.session_dir)
    return ControllerSettings(
        run_dir=run_dir,
        life=life.number,
        restore_from=life.restore_from,
        limits=Limits(heartbeat_s=recipe.run.heartbeat_s, stall_s=recipe.run.stall_s, stop_s=recipe.run.stop_s),
        queue=QueueSettings(
            batch_rows=recipe.train.batch_groups * recipe.rollout.group_size,
            max_staleness=recipe.staleness.max,
            surplus_rows=recipe.rollout.oversampling * recipe.rollout.group_size,
            version=life.step,
            incarnation=life.number,
            is_restored=bool(life.restore_from),
            late=recipe.staleness.late,
            byte_limit=recipe.queue.byte_limit_mb << 20,
            lease_s=recipe.queue.lease_s,
        ),
        needed_bytes=published_bytes(recipe, route) + (recipe.queue.byte_limit_mb << 20),
        interface=recipe.network.interface,
        is_trusted=recipe.network.trusted,
        start_s=recipe.network.meet_s,
        peer_s=recipe.network.peer_s,
        address=interface_address(recipe.network.interface),
        recipe=fingerprint(recipe),
        versions={"code": code_digest()},
        events_max_bytes=recipe.run.events_max_mb << 20,
        preload=_slow_modules(built.graph),
        **optional,
    )


def _slow_modules(graph: Graph) -> tuple[str, ...]:
    """Of this package's stages, and what runs mapped ones. A user's may do at their import what does not survive a
    fork."""
    modules = {stage.run.partition(":")[0] for stage in graph}
    ours = sorted(module for module in modules if module.startswith("flowrl."))
    return (EXECUTOR_TARGET.partition(":")[0], *ours)


def published_bytes(recipe: Recipe, route: Route) -> int:
    """What the versions kept on the node's tmpfs take, one more being written and one pinned. Where several nodes have
    trainer ranks, each keeps its part of versions beside what its relay has put together."""
    if recipe.weights.transport == "disk" or (recipe.weights.transport == "collective" and recipe.eval is None):
        return 0
    written = recipe.weights.buffers + 1 if len(route.trainer) > 1 else 0
    num_versions = recipe.weights.buffers + 2 + written
    return num_versions * version_bytes(recipe)


def fingerprint(recipe: Recipe) -> str:
    """Equal on all nodes, or the run is refused."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:16]


def code_digest() -> str:
    """Of all Python files of our packages: nodes that have installed different states of one version differ here."""
    home = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package in ("controllers", "flowrl", "transfer_queue"):
        for path in sorted((home / package).rglob("*.py")):
            digest.update(str(path.relative_to(home)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
