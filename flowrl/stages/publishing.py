"""How the trainer's versions leave it, as the recipe has it: to this node's memory, to a disk, or straight to engines.

Wires a `Publisher` to what workers announce. What a version is, and how its bytes move, is `flowrl/weights/`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from controllers.context import WorkerContext
from controllers.eventlog import EventLog
from flowrl.config import Recipe
from flowrl.stages.relay import HOLDINGS_TOPIC, written_topic
from flowrl.stages.sources import engine_topic, terms_of
from flowrl.trainer.model import Policy
from flowrl.weights.collective.writer import Collective
from flowrl.weights.form import Form
from flowrl.weights.place import Route, is_evaluated, pin_of, publishes_adapters, weights_root, written_root
from flowrl.weights.progress import Followed
from flowrl.weights.publish import Publisher
from flowrl.weights.store import WeightStore


class Publishing:
    """Of one trainer rank. `publisher` makes versions for engines, of adapters alone where that will do; where engines
    get theirs without files, `shelf` makes the ones that evaluation takes."""

    def __init__(self, context: WorkerContext, recipe: Recipe, policy: Policy) -> None:
        self._context = context
        self._recipe = recipe
        self._route = Route.from_payload(context.payload)
        transport = recipe.weights.transport
        self._is_local = transport == "shared_memory"
        self._has_relays = self._is_local and self._route.needs_relays
        self._root = written_root(recipe, context.session_dir, self._route)
        self._events: EventLog | None = None
        self._has_published = False

        self._policy = policy
        self._is_adapter = publishes_adapters(recipe)

        def make(root: Path, writes: bool, **settings: Any) -> Publisher:
            store = WeightStore(root, recipe.weights.buffers) if writes else None
            model_dir = Path(recipe.model.path)
            if not self._is_adapter:
                return Publisher(policy.published, model_dir, store, recipe.model.dtype, **settings)
            from flowrl.trainer.lora import AdapterModel, adapter_config  # peft is an extra

            adapters = AdapterModel(policy.lm)
            form = Form.of_adapters(adapters.state_dict(), adapter_config(policy.lm, model_dir), model_dir)
            return Publisher(adapters, model_dir, store, "float32", form=form, **settings)

        # One rank a node writes to the node's tmpfs; one in all to a directory that all nodes see.
        writes = context.index == 0 and (self._is_local or context.rank == 0) and transport != "collective"
        self.shelf: Publisher | None = None
        if transport == "collective":
            collective = Collective(terms_of(context, recipe), self._listen)
            self.publisher = make(self._root, False, collective=collective, on_published=self._announce)
            if recipe.eval is not None:
                self.shelf = make(weights_root(recipe, context.session_dir), context.rank == 0)
        else:
            followed = Followed(self._announce_begun, self._announce_failed) if self._has_relays else None
            self.publisher = make(
                self._root, writes, is_pooled=self._is_local, on_published=self._announce, followed=followed
            )
        if recipe.weights.check_first_sync and not self._is_adapter:  # adapters come from no checkpoint
            self.publisher.check_names()

    def begin(self, version: int) -> None:
        """Before the first version of this life. A life before may have left on disk what this one will publish."""
        if self._context.life and self._context.rank == 0 and self._recipe.weights.transport == "disk":
            WeightStore(self._root, self._recipe.weights.buffers).discard_newer_than(version - 1)

    def publish(self, version: int, events: EventLog) -> None:
        """On every rank. Makes the version visible to this node's engines, to its relay, or to all: in the background,
        once all ranks have cast their shards, or later if readers hold up all buffers. Raises what went wrong with the
        version before; `check` tells it earlier."""
        self.finish()
        self._events = events
        if not self._is_adapter:
            self._policy.refresh_published()
        pin = pin_of(self._recipe, version, self._context.node) if self._context.rank == 0 else ""
        if self.shelf is not None and is_evaluated(self._recipe, version):
            self.shelf.publish(version, pin=pin)
        is_whole = self.shelf is None and (len(self._route.trainer) == 1 or not self._has_relays)
        self.publisher.begin(version, pin=pin if is_whole else "")
        if not self._has_published and self._context.rank == 0 and self._has_relays:
            self._context.announce(HOLDINGS_TOPIC, msgspec.to_builtins(self.publisher.holdings(self._route.trainer)))
        self._has_published = True

    def finish(self) -> None:
        """The version published last is there, or waits for readers alone. Raises what went wrong with it."""
        with self._context.waiting_for("the other ranks to have written their part of the newest version"):
            self.publisher.finish()

    def check(self) -> None:
        """Raises what went wrong with the version published last, if that is known."""
        self.publisher.check()

    def whole(self) -> Publisher:
        """On every rank: of models that depend on nothing else, as they are now. Makes no versions."""
        recipe = self._recipe
        published = self._policy.published
        if not self._is_adapter:
            return self.publisher
        return Publisher(published, Path(recipe.model.path), None, recipe.model.dtype)

    def export(self, path: Path) -> None:
        """On every rank: a Hugging Face directory, in the run's."""
        self.whole().export(path, writes=self._context.rank == 0)

    def close(self) -> None:
        try:
            self.publisher.close()
        finally:
            if self.shelf is not None:
                self.shelf.close()

    def _announce(self, version: int, path: Path) -> None:
        """The version is there to be taken. Possibly in the publisher's own thread."""
        context = self._context
        if context.rank == 0:
            assert self._events is not None, "announced before it was published"
            self._events.write("published", version=version)
        news = {"version": version, "path": str(path)}
        if self._has_relays:
            self._tell_relays("written", version)
        if not self._has_relays or self._route.trainer == (context.node,):
            context.announce("published", news, everywhere=not self._is_local)

    def _announce_begun(self, version: int, path: Path) -> None:
        self._tell_relays("begun", version, path=str(path))

    def _announce_failed(self, version: int) -> None:
        self._tell_relays("failed", version)

    def _tell_relays(self, what: str, version: int, **more: Any) -> None:
        self._context.announce(written_topic(self._context.node), {"what": what, "version": version} | more)

    def _listen(self, meet: Callable[[dict[str, Any]], None]) -> None:
        for name in self._context.payload["engines"]:
            self._context.on(engine_topic(name), meet)
