"""Which engine a recipe means. Engines themselves are in `embedded/` and `sglang/`."""

from __future__ import annotations

import sys

from controllers.context import WorkerContext
from flowrl.config import Recipe
from flowrl.rollout.engine import Engine


def make_engine(recipe: Recipe, context: WorkerContext, longest_prompt: int) -> Engine:
    """An engine on the worker's first device, for prompts of up to `longest_prompt` tokens."""
    rollout = recipe.rollout
    max_model_tokens = longest_prompt + rollout.max_tokens
    device = context.devices[0]
    if rollout.engine == "sglang":
        from flowrl.rollout.sglang.engine import SGLangEngine

        return SGLangEngine(
            python=rollout.python or sys.executable,
            device=device.partition(":")[0],
            server_args={"dtype": recipe.model.dtype, **rollout.server_args},
            log_path=context.run_dir / "logs" / f"{context.name}.sglang.log",
        )
    from flowrl.rollout.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(
        device=device,
        dtype=recipe.model.dtype,
        max_batch=rollout.concurrency * rollout.group_size,
        max_model_tokens=max_model_tokens,
        threads=context.threads,
    )
