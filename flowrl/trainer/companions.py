"""The models beside the policy that an algorithm asks for: a critic, a reference. Both start where RL starts."""

from __future__ import annotations

from pathlib import Path

import torch.distributed as dist

from flowrl.config import Recipe
from flowrl.trainer.critic import Critic
from flowrl.trainer.model import Policy
from flowrl.trainer.reference import BaseReference, Reference
from flowrl.trainer.world import World


def make_critic(recipe: Recipe, world: World, warm_start: Path) -> Critic | None:
    """On every rank, after the warm start, which left its model in the directory `warm_start`."""
    if not recipe.algorithm.has_critic:
        return None
    path = starting_model("critic.path", recipe.critic.path, recipe, warm_start)
    return Critic(path, world, recipe.train, recipe.critic)


def make_reference(recipe: Recipe, policy: Policy, world: World, warm_start: Path) -> Reference | BaseReference | None:
    """As `make_critic`. Where adapters start as no change and are all that is trained, the policy holds the reference
    already."""
    if recipe.algorithm.kl is None:
        return None
    if recipe.model.lora is not None and recipe.reference.path is None and recipe.warm_start is None:
        return BaseReference(policy, world, micro_batch_tokens=recipe.train.micro_batch_tokens)
    return Reference(
        starting_model("reference.path", recipe.reference.path, recipe, warm_start),
        world,
        temperature=recipe.rollout.temperature,
        compute_dtype=recipe.train.compute_dtype,
        micro_batch_tokens=recipe.train.micro_batch_tokens,
        offload=recipe.reference.offload,
    )


def starting_model(field: str, path: str | None, recipe: Recipe, warm_start: Path) -> Path:
    """What the recipe names, or else the policy before its first update.

    Raises ValueError where the warm start's model is on another machine.
    """
    if path is not None:
        return Path(path)
    if recipe.warm_start is None:
        return Path(recipe.model.path)
    dist.barrier()  # one rank writes it
    if not warm_start.is_dir():
        raise ValueError(
            f"{field}: null; the model of the warm start, {warm_start}, is not on this machine: name a path"
        )
    return warm_start
