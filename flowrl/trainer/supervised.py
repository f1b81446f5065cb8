"""Supervised steps on demonstrations: the warm start before the first rollout. Same model, same packing, own optimizer.

The loss is the token-mean negative log-likelihood of the responses over the global batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from flowrl.config import TrainConfig
from flowrl.trainer.accumulation import Accumulation
from flowrl.trainer.model import Policy
from flowrl.trainer.optimizer import ShardedAdamW
from flowrl.trainer.packing import Demonstration, pack, split_by_tokens
from flowrl.trainer.totals import Totals
from flowrl.trainer.world import World

# Closes every step on every rank: one token, no weight.
CLOSING_DEMONSTRATION = Demonstration(np.zeros(1, np.int32), np.zeros(1, np.int32))


class SupervisedTrainer:
    """`step` trains on one batch. Clipping, moments and micro-batches are those of `train`; the rate is constant."""

    def __init__(self, policy: Policy, world: World, train: TrainConfig, learning_rate: float) -> None:
        self._policy = policy
        self._world = world
        self._train = train
        self._learning_rate = learning_rate
        self._accumulation = Accumulation(policy)
        self._optimizer = ShardedAdamW(
            policy.lm.named_parameters(), beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay
        )

    def step(self, demonstrations: Sequence[Demonstration]) -> dict[str, float]:
        """On every rank, with this rank's share of the batch, which may be empty. Returns the metrics, equal on all.

        Raises FloatingPointError, on all ranks and before anything is stepped, if loss or gradient is not finite.
        """
        totals = Totals()
        self._accumulation.begin()
        kept = [place for place, demonstration in enumerate(demonstrations) if len(demonstration.response_tokens)]
        lengths = [
            len(demonstrations[place].prompt_tokens) + len(demonstrations[place].response_tokens) for place in kept
        ]
        losses: dict[int, torch.Tensor] = {}
        for part in split_by_tokens([length - 1 for length in lengths], self._train.micro_batch_tokens):
            places = [kept[index] for index in part]
            loss_B = self._backward([demonstrations[place] for place in places], totals, weight=1.0)
            losses |= dict(zip(places, loss_B, strict=True))
        self._accumulation.close(lambda: self._backward([CLOSING_DEMONSTRATION], totals, weight=0.0))
        totals.add("grad_square_sum", self._optimizer.gradient_square_sum())
        reduced = totals.reduce(self._world)
        num_tokens = max(1.0, reduced["tokens"])
        loss, grad_norm = reduced["loss"] / num_tokens, math.sqrt(reduced["grad_square_sum"]) / num_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self._optimizer.drop_gradients()
            culprits = sorted(place for place, row_loss in losses.items() if not row_loss.isfinite())
            where = f"loss not finite in {culprits} of this rank's {len(demonstrations)} rows"
            raise FloatingPointError(
                f"warm start: loss {loss}, gradient norm {grad_norm}; parameters unchanged; {where}"
            )
        clip = min(1.0, self._train.grad_clip / (grad_norm + 1e-6))
        self._optimizer.step(clip / num_tokens, self._learning_rate)
        return {"sft/loss": loss, "sft/grad_norm": grad_norm, "sft/num_tokens": reduced["tokens"]}

    def _backward(self, demonstrations: Sequence[Demonstration], totals: Totals, weight: float) -> torch.Tensor:
        """Returns each row's loss."""
        packed = pack(
            [item.prompt_tokens for item in demonstrations],
            [item.response_tokens for item in demonstrations],
            [np.ones(len(item.response_tokens), np.uint8) for item in demonstrations],
            self._world.device,
        )
        logprob_R, _ = self._policy(packed)
        loss = -weight * logprob_R.sum()
        loss.backward()
        totals.add("loss", loss)
        totals.add("tokens", weight * len(logprob_R))
        return -packed.table(logprob_R.detach()).sum(1)
