"""What a rank gave to an optimizer step, kept until that is taken: to say, if it is not, which rows were to blame."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flowrl.trainer.packing import Sample
from transfer_queue.rows import RowKey


class NonFiniteUpdate(RuntimeError):
    """The loss or the gradient of a step is not a number; it was not taken. `rows` are this rank's culprits, `samples`
    all that it gave to the step."""

    def __init__(
        self, what: str, loss: float, grad_norm: float, rows: Sequence[RowKey], samples: Sequence[Sample]
    ) -> None:
        self.rows = tuple(rows)
        self.samples = tuple(samples)
        named = ", ".join(f"{key.partition}/{key.group}/{key.index}.{key.attempt}" for key in rows)
        where = f"the loss is not finite in rows {named}" if rows else f"it is finite in all {len(samples)} rows here"
        super().__init__(f"{what}: loss {loss}, gradient norm {grad_norm}; step not taken; {where}")


class Given:
    """samples: all that this rank gave to the step. Their losses stay on the device unless they are asked for."""

    def __init__(self) -> None:
        self.samples: list[Sample] = []
        self._losses: list[tuple[Sequence[RowKey], torch.Tensor]] = []

    def add(self, keys: Sequence[RowKey], loss_B: torch.Tensor) -> None:
        """The losses of a micro-batch, by row."""
        self._losses.append((keys, loss_B))

    def failure(self, what: str, loss: float, grad_norm: float) -> NonFiniteUpdate:
        """what: whose step it was."""
        culprits = [
            key
            for keys, loss_B in self._losses
            for key, is_finite in zip(keys, loss_B.isfinite().tolist(), strict=True)
            if not is_finite
        ]
        return NonFiniteUpdate(what, loss, grad_norm, culprits, self.samples)
