"""One policy update, streamed: samples come in while the batch is still being generated, one step ends it.

Gradients and loss are accumulated as plain sums; what divides them is known, and applied, at the end. Hence neither
the split into micro-batches nor that over ranks changes the result. It knows no queue: `flowrl/stages/train.py` feeds
it.

Shapes: B rows, T trained tokens of the longest row, R trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from flowrl.algorithms.losses import aggregate, ppo
from flowrl.config import AlgorithmConfig, TrainConfig
from flowrl.trainer.accumulation import Accumulation
from flowrl.trainer.model import Policy
from flowrl.trainer.optimizer import ShardedAdamW
from flowrl.trainer.packing import MicroBatch, Sample, pack_samples, split_by_tokens
from flowrl.trainer.schedule import learning_rate
from flowrl.trainer.totals import Totals
from flowrl.trainer.world import World
from transfer_queue.rows import RowKey

# Closes every update on every rank: one token, no advantage, no weight.
CLOSING_SAMPLE = Sample(
    key=RowKey("closing", 0, 0),
    prompt_tokens=np.zeros(1, np.int32),
    response_tokens=np.zeros(1, np.int32),
    response_mask=np.ones(1, np.uint8),
    rollout_logprobs=np.zeros(1, np.float32),
    advantage=0.0,
)


class NonFiniteUpdate(RuntimeError):
    """The loss or the gradient of an update is not a number; nothing was stepped. `rows` are this rank's culprits."""

    def __init__(self, step: int, loss: float, grad_norm: float, rows: Sequence[RowKey], num_rows: int) -> None:
        self.rows = tuple(rows)
        named = ", ".join(f"{key.partition}/{key.group}/{key.index}.{key.attempt}" for key in rows)
        where = f"the loss is not finite in rows {named}" if rows else f"it is finite in all {num_rows} rows here"
        super().__init__(f"update {step}: loss {loss}, gradient norm {grad_norm}; parameters unchanged; {where}")


class PolicyTrainer:
    """begin_update, then accumulate any number of times, then end_update; `step` counts the updates done."""

    def __init__(self, policy: Policy, world: World, train: TrainConfig, algorithm: AlgorithmConfig) -> None:
        self.policy = policy
        self.step = 0
        self.optimizer = ShardedAdamW(
            policy.lm.named_parameters(), beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay
        )
        self._world = world
        self._train = train
        self._algorithm = algorithm
        self._accumulation = Accumulation(policy)
        self._totals = Totals()
        self._row_losses: list[tuple[tuple[RowKey, ...], torch.Tensor]] = []

    def begin_update(self) -> None:
        """On every rank: gathers the parameters."""
        self._accumulation.begin()
        self._totals = Totals()
        self._row_losses = []

    def accumulate(self, samples: Sequence[Sample]) -> None:
        """Adds the gradient of these samples, in micro-batches. Free of collectives: ranks may differ in how often they
        call it. Rows left out of the forward pass are counted all the same."""
        trained = [sample.num_trained_tokens for sample in samples]
        self._totals.add("tokens", float(sum(trained)))
        self._totals.add("rows", float(sum(1 for count in trained if count)))
        kept = [
            sample
            for sample, count in zip(samples, trained, strict=True)
            if count and not (self._algorithm.skip_tied and sample.advantage == 0.0)
        ]
        lengths = [len(sample.prompt_tokens) + len(sample.response_tokens) - 1 for sample in kept]
        for part in split_by_tokens(lengths, self._train.micro_batch_tokens):
            micro_batch = pack_samples([kept[index] for index in part], self._world.device)
            loss_B = self._backward(micro_batch, weight=1.0)
            self._row_losses.append((micro_batch.keys, loss_B))

    def end_update(self) -> dict[str, float]:
        """On every rank: sums gradients, divides by the denominator of the global batch, clips, steps.

        Returns the metrics, equal on all ranks. Raises NonFiniteUpdate, on all ranks, before anything is stepped.
        """
        closing = pack_samples([CLOSING_SAMPLE], self._world.device)
        self._accumulation.close(lambda: self._close(closing))
        self._totals.add("grad_square_sum", self.optimizer.gradient_square_sum())
        totals = self._totals.reduce(self._world)
        denominator = self._denominator(totals)
        grad_norm = math.sqrt(totals["grad_square_sum"]) / denominator
        loss = totals["loss"] / denominator
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            raise self._failure(loss, grad_norm)
        rate = self.learning_rate()
        clip = min(1.0, self._train.grad_clip / (grad_norm + 1e-6))
        self.optimizer.step(clip / denominator, rate)
        self.step += 1
        return _metrics(totals) | {"actor/pg_loss": loss, "actor/grad_norm": grad_norm, "actor/lr": rate}

    def learning_rate(self) -> float:
        """That of the update to come."""
        train = self._train
        return learning_rate(
            self.step,
            peak=train.learning_rate,
            warmup_steps=train.warmup_steps,
            schedule=train.schedule,
            decay_steps=train.steps if train.decay_steps is None else train.decay_steps,
            final_ratio=train.final_learning_rate_ratio,
        )

    def _close(self, closing: MicroBatch) -> None:
        self._totals.add("tokens", 0.0)
        self._totals.add("rows", 0.0)
        self._backward(closing, weight=0.0)

    def _backward(self, micro_batch: MicroBatch, weight: float) -> torch.Tensor:
        """Forward and backward; adds to the totals. Returns each row's loss for the search of culprits."""
        packed, algorithm = micro_batch.packed, self._algorithm
        logprob_R, entropy_R = self.policy(packed)
        mask_BT = packed.mask_BT()
        loss_BT, metrics = ppo(
            packed.table(logprob_R),
            packed.table(micro_batch.rollout_logprob_R),
            micro_batch.advantage_B1,
            mask_BT,
            lo=algorithm.clip_low,
            hi=algorithm.clip_high,
            c=algorithm.dual_clip,
        )
        loss = weight * aggregate(loss_BT, mask_BT, algorithm.aggregate, denominator=1.0)
        loss.backward()
        self._totals.add("loss", loss)
        num_tokens = weight * len(logprob_R)
        self._totals.add("forward_tokens", num_tokens)
        for name, value in metrics.items():
            self._totals.add(name, value * num_tokens)
        difference_R = weight * (logprob_R.detach().exp() - micro_batch.rollout_logprob_R.exp()).abs()
        self._totals.add("actor/entropy", weight * entropy_R.sum())
        self._totals.add("probs_diff", difference_R.sum())
        self._totals.add("probs_diff_square", difference_R.square().sum())
        self._totals.maximum("training/rollout_probs_diff_max", difference_R.max())
        return loss_BT.detach().sum(1)

    def _denominator(self, totals: dict[str, float]) -> float:
        """What the aggregate divides by, over all ranks; 1 for a batch without a trained token."""
        if self._algorithm.aggregate == "token-sum":
            return 1.0
        return max(1.0, totals["tokens" if self._algorithm.aggregate == "token-mean" else "rows"])

    def _failure(self, loss: float, grad_norm: float) -> NonFiniteUpdate:
        self.optimizer.drop_gradients()
        culprits = [
            key
            for keys, loss_B in self._row_losses
            for key, is_finite in zip(keys, loss_B.isfinite().tolist(), strict=True)
            if not is_finite
        ]
        num_rows = sum(len(keys) for keys, _ in self._row_losses)
        return NonFiniteUpdate(self.step, loss, grad_norm, culprits, num_rows)


def _metrics(totals: dict[str, float]) -> dict[str, float]:
    """Means over the tokens that went through the model; sums and counts under names of their own."""
    num_tokens = max(1.0, totals["forward_tokens"])
    means = {name: value / num_tokens for name, value in totals.items() if name.startswith("actor/")}
    mean = totals["probs_diff"] / num_tokens
    variance = max(0.0, totals["probs_diff_square"] / num_tokens - mean * mean)
    return means | {
        "training/rollout_probs_diff_mean": mean,
        "training/rollout_probs_diff_std": math.sqrt(variance),
        "training/rollout_probs_diff_max": totals["training/rollout_probs_diff_max"],
        "training/num_tokens": totals["tokens"],
        "training/num_forward_tokens": totals["forward_tokens"],
    }
