"""AdamW over the shards that this rank holds. Scales, clips and steps; knows no schedule and no model.

The optimizer of torch sees plain tensors that share memory with the shards: the step is elementwise, so nothing is
gained by dispatching each of its operations through DTensor. For checkpoints the state is shown as DTensors again.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.tensor import DTensor


class ShardedAdamW:
    """One instance steps one set of parameters, of which it passes over those that need no gradient. Vectors (norms,
    biases) are not decayed. Moments lie where the shards lie, on the host if these are offloaded."""

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], *, beta1: float, beta2: float, weight_decay: float
    ) -> None:
        self._shards: list[tuple[str, DTensor, nn.Parameter]] = []
        for name, parameter in named_parameters:
            if not parameter.requires_grad:
                continue
            assert isinstance(parameter, DTensor), f"{name} is not sharded"
            self._shards.append((name, parameter, nn.Parameter(_local(parameter.detach()))))
        groups = [
            {"params": [local for _, _, local in self._shards if local.ndim > 1], "weight_decay": weight_decay},
            {"params": [local for _, _, local in self._shards if local.ndim <= 1], "weight_decay": 0.0},
        ]
        self._adam = torch.optim.AdamW(groups, lr=0.0, betas=(beta1, beta2), fused=True)
        for _, _, local in self._shards:
            self._adam.state[local] = {
                "step": torch.zeros((), dtype=torch.float32, device=local.device),
                "exp_avg": torch.zeros_like(local),
                "exp_avg_sq": torch.zeros_like(local),
            }

    def gradient_square_sum(self) -> torch.Tensor:
        """Sum of squares of this rank's shards of the gradient, float64."""
        norms = [torch.linalg.vector_norm(gradient) for gradient in self._gradients()]
        return torch.stack(norms).double().square().sum()

    def step(self, scale: float, learning_rate: float) -> None:
        """Steps along `scale` times the gradient, and drops it."""
        for (_, _, local), gradient in zip(self._shards, self._gradients(), strict=True):
            local.grad = gradient.mul_(scale)
        for group in self._adam.param_groups:
            group["lr"] = learning_rate
        self._adam.step()
        self.drop_gradients()

    def drop_gradients(self) -> None:
        for _, parameter, local in self._shards:
            parameter.grad = local.grad = None

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Live views, by name; loading into them in place restores the optimizer."""
        state: dict[str, torch.Tensor] = {}
        for name, parameter, local in self._shards:
            moments = self._adam.state[local]
            state[f"{name}.step"] = moments["step"]
            for key in ("exp_avg", "exp_avg_sq"):
                state[f"{name}.{key}"] = DTensor.from_local(
                    moments[key],
                    parameter.device_mesh,
                    parameter.placements,
                    run_check=False,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
        return state

    def _gradients(self) -> list[torch.Tensor]:
        return [_local(parameter.grad) for _, parameter, _ in self._shards]


def _local(tensor: torch.Tensor | None) -> torch.Tensor:
    assert isinstance(tensor, DTensor), "not sharded, or without a gradient"
    return tensor.to_local()
