"""What SGLang needs on a machine without CUDA; `flowrl_sglang_cpu.pth` loads this at interpreter start.

torchvision is found as a CUDA build. Its compiled half does not load beside a CPU build of torch; its Python half then
fails on import, because it attaches meta functions to operators that nobody has declared. SGLang imports torchvision
for images, which nothing here has. So its operators are declared before it is imported.

Host memory for copies off a device (routed experts go there) is registered with CUDA, which is not there: on a CPU it
is plain memory.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Sequence
from typing import Any

_SCHEMA = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _DeclareOperators(importlib.abc.MetaPathFinder):
    """Finds nothing. Sees the import of torchvision pass by, declares the operators, and is done."""

    library: object = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name == "torchvision" and self.library is None:
            import torch

            # The library lives as long as its operators are declared: kept on the finder, that is for good.
            self.library = library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(operator + _SCHEMA)
        return None


_HOST_POOLS = "sglang.srt.mem_cache.pool_host.common"


def _plain_memory(dims: tuple[int, ...], dtype: Any, device: str, pin_memory: bool, allocator: Any, **_: Any) -> Any:
    return allocator.allocate(dims, dtype=dtype, device=device)


class _PlainHostMemory(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the one module as it is, and then changes how it allocates for a CPU."""

    spec: importlib.machinery.ModuleSpec | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _HOST_POOLS or self.spec is not None:
            return None
        self.spec = importlib.machinery.PathFinder.find_spec(name, path)
        if self.spec is None:
            return None
        return importlib.util.spec_from_loader(name, self, origin=self.spec.origin)

    def exec_module(self, module: types.ModuleType) -> None:
        assert self.spec is not None and self.spec.loader is not None, "find_spec found it"
        module.__file__ = self.spec.origin
        self.spec.loader.exec_module(module)
        module.ALLOC_MEMORY_FUNCS["cpu"] = _plain_memory


sys.meta_path.insert(0, _PlainHostMemory())
sys.meta_path.insert(0, _DeclareOperators())
