"""The critic: a backbone of its own with a scalar head, its optimizer, and its update, streamed like the policy's.

Shapes: B rows, T trained tokens of the longest row, R trained tokens, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from flowrl.algorithms.value import value_loss
from flowrl.config import CriticConfig, TrainConfig
from flowrl.trainer.accumulation import Accumulation
from flowrl.trainer.failure import Given
from flowrl.trainer.model import hidden_states, load_lm
from flowrl.trainer.optimizer import ShardedAdamW
from flowrl.trainer.packing import Packed, Sample, pack, split_by_tokens
from flowrl.trainer.schedule import learning_rate
from flowrl.trainer.scoring import score_responses
from flowrl.trainer.sharding import gathered, recompute_activations, shard, shard_in_float32
from flowrl.trainer.totals import Totals
from flowrl.trainer.world import World
from transfer_queue.rows import RowKey

# Closes every update on every rank: one token, no weight.
CLOSING_SAMPLE = Sample(
    key=RowKey("closing", 0, 0),
    prompt_tokens=np.zeros(1, np.int32),
    response_tokens=np.zeros(1, np.int32),
    response_mask=np.ones(1, np.uint8),
    rollout_logprobs=np.zeros(1, np.float32),
    advantage=0.0,
)


class ValueModel(nn.Module):
    """Tokens in, the value of the state before each trained token out. The head starts at zero: so do all values."""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = lm.base_model
        self.head = nn.Linear(lm.config.get_text_config().hidden_size, 1, dtype=torch.float32)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, packed: Packed) -> torch.Tensor:
        """Returns value_R, float32."""
        # Summed over its one column: FSDP warns of views that a root returns.
        return self.head(hidden_states(self.backbone, packed).float()).sum(-1)


class Critic:
    """begin_update, then accumulate any number of times, then end_update; `step` counts the updates done.

    The backbone starts as that of the model at `path`. Micro-batches, dtype, clipping, schedule are those of `train`.
    """

    def __init__(self, path: str | Path, world: World, train: TrainConfig, critic: CriticConfig) -> None:
        self.model = ValueModel(load_lm(path)).to(world.device).eval()
        if train.activation_checkpointing:
            recompute_activations(self.model.backbone)
        shard_in_float32(self.model.head, world, offload=train.offload)
        shard(self.model, self.model.backbone, world, compute_dtype=train.compute_dtype, offload=train.offload)
        self.step = 0
        self.optimizer = ShardedAdamW(
            self.model.named_parameters(), beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay
        )
        self._world = world
        self._train = train
        self._critic = critic
        self._accumulation = Accumulation(self.model)
        self._totals = Totals()
        self._given = Given()

    def values(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Float32, one for each response token, masked ones included: the value of the state before the token.

        During an update it waits for nobody; otherwise every rank must call it, with as many samples as it has.
        """
        budget, device = self._train.micro_batch_tokens, self._world.device
        if self._accumulation.is_open:
            return score_responses(self.model, samples, budget, device)
        with gathered(self.model):
            return score_responses(self.model, samples, budget, device)

    def begin_update(self) -> None:
        """On every rank: gathers the parameters."""
        self._accumulation.begin()
        self._totals = Totals()
        self._given = Given()

    def accumulate(
        self, samples: Sequence[Sample], returns: Sequence[np.ndarray], old_values: Sequence[np.ndarray]
    ) -> None:
        """Adds the gradient of these samples, in micro-batches, free of collectives. returns, old_values: for each
        sample one number a response token; only tokens whose mask is 1 count.

        Raises ValueError for a sample whose arrays differ in length.
        """
        for sample, *others in zip(samples, returns, old_values, strict=True):
            if any(len(other) != len(sample.response_tokens) for other in others):
                found = " and ".join(str(len(other)) for other in others)
                expected = len(sample.response_tokens)
                raise ValueError(f"returns, old_values: row {sample.key} has {found}; must be {expected}, one a token")
            more = dict(zip(("return", "value"), others, strict=True))
            self._given.samples.append(replace(sample, per_token={**sample.per_token, **more}))
        kept = [place for place, sample in enumerate(samples) if sample.num_trained_tokens]
        lengths = [len(samples[place].prompt_tokens) + len(samples[place].response_tokens) - 1 for place in kept]
        for part in split_by_tokens(lengths, self._train.micro_batch_tokens):
            chosen = [kept[index] for index in part]
            loss_B = self._backward(
                [samples[place] for place in chosen],
                [returns[place] for place in chosen],
                [old_values[place] for place in chosen],
                weight=1.0,
            )
            self._given.add([samples[place].key for place in chosen], loss_B)

    def end_update(self) -> dict[str, float]:
        """On every rank: sums gradients, divides by the trained tokens of the global batch, clips, steps.

        Returns the metrics, equal on all ranks. Raises NonFiniteUpdate, on all ranks, before that step is taken.
        """
        zero = [np.zeros(1, np.float32)]
        self._accumulation.close(lambda: self._backward([CLOSING_SAMPLE], zero, zero, weight=0.0))
        self._totals.add("grad_square_sum", self.optimizer.gradient_square_sum())
        totals = self._totals.reduce(self._world)
        num_tokens = max(1.0, totals["tokens"])
        loss, grad_norm = totals["loss"] / num_tokens, math.sqrt(totals["grad_square_sum"]) / num_tokens
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.drop_gradients()
            raise self._given.failure(f"critic, update {self.step}", loss, grad_norm)
        rate = self.learning_rate()
        self.optimizer.step(min(1.0, self._train.grad_clip / (grad_norm + 1e-6)) / num_tokens, rate)
        self.step += 1
        return {
            "critic/vf_loss": loss,
            "critic/vf_clipfrac": totals["clipped"] / num_tokens,
            "critic/vf_explained_var": _explained_variance(totals, num_tokens),
            "critic/grad_norm": grad_norm,
            "critic/lr": rate,
        }

    def learning_rate(self) -> float:
        """That of the update to come: the schedule of `train` with a peak and a warm-up of the critic's own."""
        train = self._train
        return learning_rate(
            self.step,
            peak=self._critic.learning_rate,
            warmup_steps=self._critic.warmup_steps,
            schedule=train.schedule,
            decay_steps=train.steps if train.decay_steps is None else train.decay_steps,
            final_ratio=train.final_learning_rate_ratio,
        )

    def _backward(
        self,
        samples: Sequence[Sample],
        returns: Sequence[np.ndarray],
        old_values: Sequence[np.ndarray],
        weight: float,
    ) -> torch.Tensor:
        """Forward and backward; adds to the totals. Returns each row's loss."""
        masks = [sample.response_mask for sample in samples]
        packed = pack(
            [sample.prompt_tokens for sample in samples],
            [sample.response_tokens for sample in samples],
            masks,
            self._world.device,
        )
        trained = np.concatenate(masks).astype(bool)
        return_R, old_value_R = (
            torch.from_numpy(np.concatenate(rows)[trained].astype(np.float32)).to(self._world.device)
            for rows in (returns, old_values)
        )
        value_R = self.model(packed)
        loss_BT, metrics = value_loss(
            packed.table(value_R),
            packed.table(old_value_R),
            packed.table(return_R),
            packed.mask_BT(),
            self._critic.value_clip,
        )
        loss = weight * loss_BT.sum()
        loss.backward()
        num_tokens = weight * len(value_R)
        self._totals.add("loss", loss)
        self._totals.add("tokens", num_tokens)
        self._totals.add("clipped", metrics["critic/vf_clipfrac"] * num_tokens)
        for name, x_R in {"return": return_R, "error": return_R - value_R.detach()}.items():
            self._totals.add(name, weight * x_R.double().sum())
            self._totals.add(f"{name}_square", weight * x_R.double().square().sum())
        return loss_BT.detach().sum(1)


def _explained_variance(totals: dict[str, float], num_tokens: float) -> float:
    """1 - Var(R - V)/Var(R) over the global batch, float64; 0 if R is constant."""
    returns, errors = (
        totals[f"{name}_square"] / num_tokens - (totals[name] / num_tokens) ** 2 for name in ("return", "error")
    )
    scale = totals["return_square"] / num_tokens
    # What is left of equal returns after rounding is no spread.
    return 1.0 - errors / returns if returns > 1e-12 * scale else 0.0
