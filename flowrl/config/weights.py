"""What a recipe says of published weights."""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.config.checks import check_at_least, check_one_of


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """transport: `shared_memory` (trainer ranks write to their node's tmpfs; relays carry versions to the other nodes)
    or `disk` (a directory, `dir`, that all nodes see). buffers: versions that are visible or being read at most.
    check_first_sync: before the first sample, compare what is published with the checkpoint and what an engine loads
    with what is published. delta: between nodes, send only the bytes that changed. anchor_every: of so many transfers
    one is sent whole."""

    transport: str = "shared_memory"
    dir: str | None = None
    buffers: int = 3
    check_first_sync: bool = True
    delta: bool = True
    anchor_every: int = 20

    def __post_init__(self) -> None:
        check_one_of("weights.transport", self.transport, ("shared_memory", "disk"))
        check_at_least("weights.buffers", self.buffers, 2)
        check_at_least("weights.anchor_every", self.anchor_every, 1)
        if (self.transport == "disk") != (self.dir is not None):
            raise ValueError(f"weights.dir: {self.dir!r}; transport=disk needs it, and only that takes it")
