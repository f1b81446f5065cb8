"""The relay worker: one on each node that has trainer ranks, engines or evaluation, where weights cross nodes.

Wires a `Relay` to what workers announce: which versions were written where, and the relays of the other nodes.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from controllers.context import WorkerContext
from flowrl.config import Recipe, load
from flowrl.weights.place import Route, pin_of, weights_root, written_root
from flowrl.weights.relay import Relay
from flowrl.weights.slices import Holdings
from flowrl.weights.store import WeightStore, companions_of

HOLDINGS_TOPIC = "weights/holdings"


def main(context: WorkerContext) -> None:
    recipe = load(context.payload["recipe"])
    route = Route.from_payload(context.payload)
    relay = make_relay(context, recipe, route)
    context.on(HOLDINGS_TOPIC, lambda news: relay.hold(msgspec.convert(news, Holdings, strict=False)))
    for node in route.trainer:
        context.on(written_topic(node), partial(_on_written, relay, node))
    for node in route.nodes:
        context.on(relay_topic(node), partial(_on_relay, relay, node))
    context.announce(relay_topic(context.node), {"endpoint": relay.endpoint})
    context.on_stop(relay.stop)
    context.ready()
    relay.run()


def make_relay(context: WorkerContext, recipe: Recipe, route: Route) -> Relay:
    buffers = recipe.weights.buffers

    def announce(version: int, path: Path) -> None:
        context.announce("published", {"version": version, "path": str(path)}, everywhere=False)

    written = WeightStore(written_root(recipe, context.session_dir, route), buffers)
    is_exposed = bool(context.queue_secret)
    return Relay(
        node=context.node,
        serving=route.serving,
        store=WeightStore(weights_root(recipe, context.session_dir), buffers),
        written=written if context.node in route.trainer else None,
        companions=companions_of(Path(recipe.model.path)),
        bind=f"tcp://{context.payload['address']}:*" if is_exposed else f"ipc://{context.session_dir}/relay",
        secret=context.queue_secret,
        delta=recipe.weights.delta,
        anchor_every=recipe.weights.anchor_every,
        on_published=announce,
        pin_of=partial(pin_of, recipe, node=context.node),
    )


def written_topic(node: int) -> str:
    """What becomes of the versions that its ranks write, in one topic, so that it is heard in its order."""
    return f"weights/written/{node}"


def relay_topic(node: int) -> str:
    return f"weights/relay/{node}"


def _on_written(relay: Relay, node: int, news: dict[str, Any]) -> None:
    version = news["version"]
    match news["what"]:
        case "begun":
            relay.begun(node, version, Path(news["path"]))
        case "failed":
            relay.failed(node, version)
        case "written":
            relay.written(node, version)


def _on_relay(relay: Relay, node: int, news: dict[str, Any]) -> None:
    relay.connect(node, news["endpoint"])
