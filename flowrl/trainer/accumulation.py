"""Gradients of one update under FSDP2: parameters gathered once, ranks free of each other, one closing backward.

    begin -> any number of backward passes, different on each rank -> close (one backward on every rank) -> sharded

Between `begin` and `close` no rank waits for another, so one may run five micro-batches while its neighbour runs two.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from flowrl.trainer.sharding import fsdp_modules, keep_gathered


class Accumulation:
    """Owns the sharding state of `root` during an update; the parameters must fit unsharded."""

    def __init__(self, root: nn.Module) -> None:
        self._modules = fsdp_modules(root)
        self.is_open = False
        keep_gathered(root)

    def begin(self) -> None:
        """A collective: gathers the parameters."""
        assert not self.is_open, "the update before this one has not ended"
        for module in self._modules:
            module.unshard()
            module.set_requires_gradient_sync(False, recurse=False)
        self.is_open = True

    def abandon(self) -> None:
        """Leaves parameters sharded, and what was accumulated to nobody. Nothing, if no update has begun."""
        if self.is_open:
            for module in self._modules:
                module.reshard()
            self.is_open = False

    def close(self, backward: Callable[[], object]) -> None:
        """A collective: `backward` must run one pass through the whole model, with which the gradients that were
        accumulated before it are summed over all ranks. Leaves parameters and gradients sharded."""
        assert self.is_open, "no update has begun"
        for module in self._modules:
            module.set_requires_gradient_sync(True, recurse=False)
        backward()
        for module in self._modules:
            module.reshard()
        self.is_open = False
