"""Stands in for SGLang's compiled CPU kernels, which no package provides.

The server imports them by name when `SGLANG_USE_CPU_ENGINE=1`, also those that plain torch attention never calls. Each
name can be imported; calling one says what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

__version__ = "0.0.0"


def _absent(name: str) -> Callable[..., NoReturn]:
    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: this environment holds no compiled kernel; see tests/sglang_cpu")

    return kernel


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}")
    return _absent(name)
