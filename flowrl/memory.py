"""How much memory of its device this process holds, and how what it has freed goes back to the system. No policy."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

CUDA = "cuda:"


def held_mb(device: str) -> float | None:
    """On the host: what is resident and the process's own, without mapped files. On a GPU: what torch has reserved
    there, or None where this process has not touched it."""
    if device.startswith(CUDA):
        torch = sys.modules.get("torch")
        if torch is None or not torch.cuda.is_initialized():
            return None
        return float(torch.cuda.memory_reserved(device)) / 2**20
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (resident,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(resident.split()[1]) / 2**10


def give_back(device: str) -> None:
    """Allocators keep what is freed for later; now others may have it."""
    if device.startswith(CUDA):
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others have none
    if trim is not None:
        trim(0)
