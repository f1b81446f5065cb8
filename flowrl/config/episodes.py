"""What a recipe says of episodes: the sandbox of the Python tool, and the user's environment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from flowrl.config.checks import check_at_least, check_dotted, check_one_of, check_positive


@dataclass(frozen=True, kw_only=True)
class SandboxConfig:
    """Limits of one piece of untrusted Python. isolation: `full` (own user, files, network and processes; refused where
    the machine does not allow it) or `limits` (resource limits only: for code that you would run yourself). wall_s and
    cpu_s end it; memory_mb is of one process, of which it may have `processes`; files_mb: what it may write. output_kb:
    what is kept of its output. concurrency: pieces that run at once, the others wait; the number of cores if null.
    paths: directories that it may read, on its import path."""

    isolation: str = "full"
    wall_s: float = 5.0
    cpu_s: int = 5
    memory_mb: int = 512
    processes: int = 8
    files_mb: int = 16
    output_kb: int = 16
    concurrency: int | None = None
    paths: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_one_of("rollout.sandbox.isolation", self.isolation, ("full", "limits"))
        check_positive("rollout.sandbox.wall_s", self.wall_s)
        for name in ("cpu_s", "processes", "files_mb", "output_kb"):
            check_at_least(f"rollout.sandbox.{name}", getattr(self, name), 1)
        check_at_least("rollout.sandbox.memory_mb", self.memory_mb, 64)
        if self.concurrency is not None:
            check_at_least("rollout.sandbox.concurrency", self.concurrency, 1)


@dataclass(frozen=True, kw_only=True)
class EnvironmentConfig:
    """path: a class, `file.py:Class` or `package.module:Class`, of which each episode gets an object. settings: what it
    is made with. timeout_s: the longest that `reset` or `step` may take."""

    path: str
    settings: dict[str, Any] = field(default_factory=dict)
    timeout_s: float = 30.0

    def __post_init__(self) -> None:
        check_dotted("rollout.environment.path", self.path)
        check_positive("rollout.environment.timeout_s", self.timeout_s)
