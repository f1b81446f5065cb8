"""What this machine has: cores, memory, tmpfs, disk, descriptors, GPUs, packages. Looks, changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

GPU_PROBE = (
    "import json, torch; print(json.dumps([torch.cuda.get_device_properties(i).total_memory"
    " for i in range(torch.cuda.device_count())]))"
)
PROBE_TIMEOUT_S = 120.0
PACKAGES = ("torch", "transformers", "numpy", "pyzmq", "msgspec", "safetensors")


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Bytes throughout. gpus: memory of each. open_files: the soft limit."""

    cores: int
    memory: int
    shared_free: int
    disk_free: int
    open_files: int
    gpus: tuple[int, ...]


def look(session_root: Path, run_dir: Path) -> Machine:
    return Machine(
        cores=len(os.sched_getaffinity(0)),
        memory=_memory(),
        shared_free=shutil.disk_usage(_existing(session_root)).free,
        disk_free=shutil.disk_usage(_existing(run_dir)).free,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        gpus=gpus(),
    )


def package_versions() -> dict[str, str]:
    """Empty for one that is missing."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


def gpus() -> tuple[int, ...]:
    """In a process of its own, so that this one never touches a GPU."""
    if importlib.util.find_spec("torch") is None:
        return ()
    try:
        done = subprocess.run(
            [sys.executable, "-c", GPU_PROBE], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return ()
    return tuple(json.loads(done.stdout)) if done.returncode == 0 else ()


def sglang_version(python: str) -> str:
    """Of the interpreter that a recipe names; empty if it has none or does not start."""
    probe = "import importlib.metadata as m; print(m.version('sglang'))"
    try:
        done = subprocess.run(
            [python, "-c", probe], capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _memory() -> int:
    """The machine's, or less where a container may have less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _existing(path: Path) -> Path:
    """The directory itself, or the nearest above it that exists."""
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path
