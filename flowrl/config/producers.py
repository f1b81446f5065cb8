"""Further rollout stages of a recipe: the same prompts, engines of their own."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from flowrl.config.rollout import RolloutConfig

ENGINES_OWN = ("server_args", "python", "servers", "urls")
"""What belongs to a kind of engine, and is not handed on to one of another."""


@dataclass(frozen=True, kw_only=True)
class ProducerConfig:
    """A rollout stage beside `rollout`, on the same prompts: each group is sampled by one of them. What is left out is
    as `rollout` says, but for what belongs to an engine of another kind. pool: by default the one of the producer's
    name."""

    pool: str | None = None
    engine: str | None = None
    concurrency: int | None = None
    in_flight: str | None = None
    server_args: dict[str, Any] | None = None
    python: str | None = None
    servers: int | None = None
    urls: list[str] | None = None

    def rollout(self, main: RolloutConfig) -> RolloutConfig:
        """`main` as this one has it. Raises ValueError as `RolloutConfig` does."""
        given = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "pool"}
        said = {name: value for name, value in given.items() if value is not None}
        if said.get("engine", main.engine) != main.engine:
            fresh = RolloutConfig()
            said = {name: getattr(fresh, name) for name in ENGINES_OWN} | said
        return replace(main, **said)
