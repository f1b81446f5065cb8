"""What `run.determinism: strict` asks of a process that computes: kernels that add in the same order every time.

Which rows meet in a batch is the stages' part (`rollout/shares.py`, `trainer/share.py`); this file owns torch's.
"""

from __future__ import annotations

import os

from flowrl.config import Recipe
from flowrl.config.recipe import is_strict

# cuBLAS reads it when it is first used: one of the two settings with which it has one order of summation.
_CUBLAS_WORKSPACE = ":4096:8"


def fix_kernels(recipe: Recipe) -> None:
    """Call it in a worker before torch computes. An operation without a deterministic kernel then raises."""
    if not is_strict(recipe):
        return
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = _CUBLAS_WORKSPACE
    import torch

    torch.use_deterministic_algorithms(True)
