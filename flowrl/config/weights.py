"""What a recipe says of published weights."""

from __future__ import annotations

from dataclasses import dataclass

from flowrl.config.checks import check_at_least, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class WeightsConfig:
    """transport: `shared_memory` (trainer ranks write to their node's tmpfs; relays carry versions to the other nodes)
    `disk` (a directory, `dir`, that all nodes see), or `collective` (torch.distributed, from trainer ranks straight
    into embedded engines; NCCL between GPUs, else gloo). buffers: versions that are visible or being read at most.
    check_first_sync: before the first sample, compare what is published with the checkpoint and what an engine loads
    with what is published. delta: between nodes, send only the bytes that changed, where that is faster. anchor_every:
    of so many transfers one is sent whole, and one by changes. bucket_mb: of `collective`, what all ranks send in a
    round; an engine has room for two, and ranks for two versions of their shards. timeout_s: of `collective`, silence
    after which the other end is lost."""

    transport: str = "shared_memory"
    dir: str | None = None
    buffers: int = 3
    check_first_sync: bool = True
    delta: bool = True
    anchor_every: int = 20
    bucket_mb: int = 256
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_one_of("weights.transport", self.transport, ("shared_memory", "disk", "collective"))
        check_at_least("weights.buffers", self.buffers, 2)
        check_at_least("weights.anchor_every", self.anchor_every, 1)
        check_at_least("weights.bucket_mb", self.bucket_mb, 1)
        check_positive("weights.timeout_s", self.timeout_s)
        if (self.transport == "disk") != (self.dir is not None):
            raise ValueError(f"weights.dir: {self.dir!r}; transport=disk needs it, and only that takes it")
