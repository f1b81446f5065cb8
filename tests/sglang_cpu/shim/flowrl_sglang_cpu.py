"""Declares torchvision's operators before it is imported. `flowrl_sglang_cpu.pth` loads this at interpreter start.

torchvision is found as a CUDA build. Its compiled half does not load beside a CPU build of torch; its Python half then
fails on import, because it attaches meta functions to operators that nobody has declared. SGLang imports torchvision
for images, which nothing here has.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Sequence

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


sys.meta_path.insert(0, _DeclareOperators())
