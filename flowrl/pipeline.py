"""From a recipe to what the controllers run: stages, pools, worker settings. The only file that wires things together.

Imports nothing heavy: a recipe is checked, drawn and placed without torch. Executors are named by dotted paths.
"""

from __future__ import annotations

import fcntl
import hashlib
import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import msgspec

from controllers.graph import Graph
from controllers.placement import Pool, WorkerPlan, plan
from controllers.settings import EXECUTOR_TARGET, ControllerSettings, QueueSettings, WorkerSettings
from controllers.stage import Kind, Stage, Unit
from flowrl.config import PoolConfig, Recipe, to_yaml
from flowrl.weights.place import serving_bytes

SIOCGIFADDR = 0x8915

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
            unit=Unit.BATCH,
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


def worker_settings(built: Pipeline, recipe_path: Path) -> dict[str, WorkerSettings]:
    """How each kind of worker is started, what it is given, and whether it comes back after a death: engines, stages
    and evaluation do; a rank of the trainer's world does not, because the world dies with it."""
    settings: dict[str, WorkerSettings] = {}
    for worker, members in built.graph.workers().items():
        payload: dict[str, Any] = {"recipe": str(recipe_path)}
        target = members[0].run
        if members[0].kind is Kind.MAPPED:
            target = EXECUTOR_TARGET
            payload["stages"] = [msgspec.to_builtins(stage) for stage in members]
        restart: Literal["always", "never"] = "never" if worker == "train" else "always"
        settings[worker] = {"target": target, "payload": payload, "restart": restart}
    return settings


def controller_settings(built: Pipeline, run_dir: Path) -> ControllerSettings:
    """Raises ValueError for an interface that this machine does not have."""
    recipe = built.recipe
    optional: dict[str, Any] = {}
    if recipe.run.session_dir is not None:
        optional["session_root"] = Path(recipe.run.session_dir)
    return ControllerSettings(
        run_dir=run_dir,
        queue=QueueSettings(
            batch_rows=recipe.train.batch_groups * recipe.rollout.group_size,
            max_staleness=recipe.staleness.max,
            late=cast(Literal["wait", "drop"], recipe.staleness.late),
            byte_limit=recipe.queue.byte_limit_mb << 20,
            lease_s=recipe.queue.lease_s,
        ),
        needed_bytes=published_bytes(recipe),
        interface=recipe.network.interface,
        is_trusted=recipe.network.trusted,
        address=interface_address(recipe.network.interface),
        recipe=fingerprint(recipe),
        **optional,
    )


def published_bytes(recipe: Recipe) -> int:
    """What the versions kept on the node's tmpfs take, one more being written and one pinned."""
    if recipe.weights.transport == "disk":
        return 0
    return (recipe.weights.buffers + 2) * serving_bytes(Path(recipe.model.path), recipe.model.dtype)


def fingerprint(recipe: Recipe) -> str:
    """Equal on all nodes, or the run is refused."""
    return hashlib.sha256(to_yaml(recipe).encode()).hexdigest()[:16]


def interface_address(interface: str) -> str:
    """The IPv4 address of a network interface of this machine."""
    request = struct.pack("256s", interface.encode()[:15])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, request)
        except OSError as error:
            names = ", ".join(name for _, name in socket.if_nameindex())
            raise ValueError(
                f"network.interface: {interface!r}; has no address here ({error.strerror}); this machine has {names}"
            ) from None
    return socket.inet_ntoa(answer[20:24])
