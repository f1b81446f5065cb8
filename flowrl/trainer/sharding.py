"""How FSDP2 splits a model over the ranks, and where its layers recompute. It knows no loss and no optimizer.

A *root* is what is sharded as one: a backbone (the decoder of Hugging Face) with what stands on it, a language head or
a value head.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import checkpoint

from flowrl.trainer.world import World

COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# Where architectures keep their decoder layers: Llama and its descendants, GPT-2.
LAYER_NAMES = ("layers", "h")


def decoder_layers(backbone: nn.Module) -> nn.ModuleList:
    """Raises ValueError for a backbone whose layers stand under no known name."""
    for name in LAYER_NAMES:
        layers = getattr(backbone, name, None)
        if isinstance(layers, nn.ModuleList):
            return layers
    raise ValueError(
        f"model.path: its {type(backbone).__name__} keeps no decoder layers to shard under {' or '.join(LAYER_NAMES)}"
    )


def shard(
    root: nn.Module, backbone: nn.Module, world: World, *, compute_dtype: str = "float32", offload: str = "none"
) -> None:
    """FSDP2 on each decoder layer of `backbone`, then on the rest of `root`. Gradients are summed over ranks, in
    float32, never averaged: their denominator is known only at the end of the update.

    offload: `all` keeps parameters, gradients and hence optimizer on the host; layers visit the device when gathered.
    """
    is_float32 = compute_dtype == "float32"
    precision = MixedPrecisionPolicy(
        param_dtype=None if is_float32 else COMPUTE_DTYPES[compute_dtype],
        reduce_dtype=None if is_float32 else torch.float32,
    )
    place = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload == "all" else OffloadPolicy()
    for layer in decoder_layers(backbone):
        fully_shard(layer, mesh=world.mesh, mp_policy=precision, offload_policy=place)
    fully_shard(root, mesh=world.mesh, mp_policy=precision, offload_policy=place)
    for module in fsdp_modules(root):
        # Neither setter recurses; gloo has no scaled sum, hence the second.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def shard_in_float32(module: nn.Module, world: World, *, offload: str = "none") -> None:
    """For a small part of a root that computes in float32 whatever the rest does. Before `shard`."""
    place = CPUOffloadPolicy(pin_memory=world.device.type == "cuda") if offload == "all" else OffloadPolicy()
    fully_shard(module, mesh=world.mesh, offload_policy=place)


def fsdp_modules(root: nn.Module) -> list[FSDPModule]:
    """The root first, as their first unsharding requires."""
    return [module for module in root.modules() if isinstance(module, FSDPModule)]


def keep_gathered(root: nn.Module) -> None:
    """From now on a pass through the model leaves parameters as it found them; gathering is up to the caller."""
    for module in fsdp_modules(root):
        module.set_reshard_after_forward(False, recurse=False)
        module.set_reshard_after_backward(False, recurse=False)


@contextmanager
def gathered(root: nn.Module) -> Iterator[None]:
    """A collective at the start; within, ranks are free of each other as long as nothing is differentiated."""
    modules = fsdp_modules(root)
    for module in modules:
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.reshard()


def recompute_activations(backbone: nn.Module) -> None:
    """Each decoder layer keeps only its input and runs again in the backward pass. Before `shard`.

    Not the switch of Hugging Face's: that one acts in training mode alone, and this trainer stays out of it.
    """
    for layer in decoder_layers(backbone):
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
