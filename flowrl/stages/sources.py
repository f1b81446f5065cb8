"""Where a rollout worker's weights come from: directories that appear, or trainer ranks that send them.

A source knows how its engine takes a version that has been announced. Which version, and when, is the stage's to say.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import msgspec
import torch

from controllers.context import WorkerContext
from flowrl.config import Recipe
from flowrl.rollout.engine import Engine, FillableEngine, PauseMode
from flowrl.weights.check import check_first_sync
from flowrl.weights.collective.giver import Terms
from flowrl.weights.collective.group import use_interface
from flowrl.weights.collective.receiver import Receiver
from flowrl.weights.store import reading

BEFORE_FIRST = -1


class Source(Protocol):
    async def start(self, engine: Engine, news: dict[str, Any]) -> None:
        """Starts the engine on the version of the announcement. Raises FileNotFoundError if a newer one has taken its
        place."""
        ...

    async def load(self, engine: Engine, news: dict[str, Any], mode: PauseMode) -> None:
        """As `start`, for an engine that runs."""
        ...

    def close(self) -> None: ...


def make_source(context: WorkerContext, recipe: Recipe) -> Source:
    return (
        CollectiveSource(context, recipe) if recipe.weights.transport == "collective" else Directories(context, recipe)
    )


class Directories:
    """A version is held while the engine reads it."""

    def __init__(self, context: WorkerContext, recipe: Recipe) -> None:
        self._scratch = context.session_dir / f"check-{context.name}"
        self._checks = recipe.weights.check_first_sync
        self._is_soon_started = recipe.rollout.engine == "embedded"

    async def start(self, engine: Engine, news: dict[str, Any]) -> None:
        path, version = Path(news["path"]), news["version"]
        with reading(path):
            await engine.start(path, version)
            if self._checks:
                await check_first_sync(engine, path, version, self._scratch, starts_anew=self._is_soon_started)

    async def load(self, engine: Engine, news: dict[str, Any], mode: PauseMode) -> None:
        with reading(Path(news["path"])):
            await engine.load_weights(Path(news["path"]), news["version"], mode)

    def close(self) -> None:
        pass


class CollectiveSource:
    """Announces this engine to the trainer's ranks, and receives from them into its parameters."""

    def __init__(self, context: WorkerContext, recipe: Recipe) -> None:
        self._context = context
        self._model_dir = Path(recipe.model.path)
        self._checks = recipe.weights.check_first_sync
        self._has_met = False
        use_interface(recipe.network.interface)
        is_exposed, address = bool(context.queue_secret), context.payload["address"]
        self._receiver = Receiver(
            context.name,
            context.payload["trainer_ranks"],
            bind=f"tcp://{address}:*" if is_exposed else f"ipc://{context.session_dir}/weights-{context.name}",
            directory=context.session_dir if context.num_nodes == 1 else None,
            address=address,
            bucket_bytes=recipe.weights.bucket_mb << 20,
            terms=terms_of(context, recipe),
            is_over=context.stopping.is_set,
        )
        context.announce(engine_topic(context.name), msgspec.to_builtins(self._receiver.news))

    async def start(self, engine: Engine, news: dict[str, Any]) -> None:
        """On the checkpoint that training begins with, and then, before it serves, on the version."""
        version = news["version"]
        if not self._has_met:
            await engine.start(self._model_dir, BEFORE_FIRST)
            if not await asyncio.to_thread(self._receiver.meet):
                return
            self._has_met = True
        if self._checks:
            fillable = cast("FillableEngine", engine)
            await fillable.load_weights(partial(self._check, version), version, PauseMode.RECOMPUTE)
        else:
            await self.load(engine, news, PauseMode.RECOMPUTE)

    async def load(self, engine: Engine, news: dict[str, Any], mode: PauseMode) -> None:
        """Raises PeerLost, naming the trainer rank."""
        version = news["version"]
        if not await asyncio.to_thread(self._receiver.open, version):
            raise FileNotFoundError(f"version {version}")
        # A recipe with this transport and another engine is refused.
        await cast("FillableEngine", engine).load_weights(self._receiver.receive, version, mode)

    def close(self) -> None:
        self._receiver.close()

    def _check(self, version: int, tensors: Any) -> None:
        if not self._receiver.check(version, tensors):
            raise FileNotFoundError(f"version {version}")


def terms_of(context: WorkerContext, recipe: Recipe) -> Terms:
    """The same on both ends of a transfer."""
    return Terms(torch.device(context.devices[0]), context.queue_secret, recipe.weights.timeout_s)


def engine_topic(worker: str) -> str:
    return f"weights/engine/{worker}"
