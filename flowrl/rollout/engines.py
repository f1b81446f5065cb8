"""Which engine a recipe means. Engines themselves are in `embedded/` and `sglang/`."""

from __future__ import annotations

import sys

from controllers.context import WorkerContext
from flowrl.config import Recipe
from flowrl.rollout.engine import Engine

EVALUATION_BATCH = 256


def make_engine(recipe: Recipe, context: WorkerContext, longest_prompt: int) -> Engine:
    """An engine on the worker's first device, for prompts of up to `longest_prompt` tokens."""
    rollout = recipe.rollout
    if rollout.engine == "sglang":
        from flowrl.rollout.sglang.engine import SGLangEngine

        return SGLangEngine(
            python=rollout.python or sys.executable,
            device=context.device.partition(":")[0],
            devices=context.devices,
            server_args={"dtype": recipe.model.dtype, **rollout.server_args},
            log_path=context.run_dir / "logs" / f"{context.name}.sglang.log",
            servers=rollout.servers,
            urls=rollout.urls,
            routed_experts=rollout.routed_experts,
            log=context.log,
        )
    responses = rollout.group_size + rollout.redundancy + recipe.algorithm.has_greedy_baseline
    return _embedded(recipe, context, rollout.concurrency * responses, longest_prompt)


def make_evaluation_engine(recipe: Recipe, context: WorkerContext, longest_prompt: int) -> Engine:
    """Embedded whatever the rollout uses: it follows pinned versions on its own device, and needs no server."""
    return _embedded(recipe, context, EVALUATION_BATCH, longest_prompt)


def _embedded(recipe: Recipe, context: WorkerContext, max_batch: int, longest_prompt: int) -> Engine:
    from flowrl.rollout.embedded.engine import EmbeddedEngine

    return EmbeddedEngine(
        device=context.device,
        dtype=recipe.model.dtype,
        max_batch=max_batch,
        max_model_tokens=longest_prompt + recipe.rollout.max_tokens,
        threads=context.threads,
    )
