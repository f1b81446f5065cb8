"""Every way that a policy loss is put together, by every way that a batch is cut: gradients, and what they must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flowrl.algorithms import losses
from flowrl.algorithms.corrections import importance_weights
from flowrl.algorithms.kl import kl_loss
from flowrl.algorithms.shaping import entropy_bonus
from flowrl.config import TrainConfig
from flowrl.config.presets import configured
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Sample
from flowrl.trainer.reference import Reference
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from tests.trainer.cases import TEMPERATURE, Padded, first_gradient, padded_scores, update

LONGEST = 20
SEQUENCES = "seq-mean-token-mean"


@dataclass(frozen=True)
class Batch:
    """All rows at once, in float64 as far as the losses are."""

    padded: Padded
    reference_BT: Tensor
    advantage_B1: Tensor

    def loss(self, function: Callable[..., losses.PolicyLoss], *, is_anchored: bool = False, **given: Any) -> Tensor:
        """is_anchored: in the policy before the update, rather than in what sampled the tokens."""
        x = self.padded
        old_BT = x.logprob_BT.detach() if is_anchored else x.behave_BT
        return function(x.logprob_BT, old_BT, self.advantage_B1, x.mask_BT, **given).loss_BT

    def decoupled(self) -> Tensor:
        return self.loss(losses.decoupled_ppo, is_anchored=True, behave_logprob_BT=self.padded.behave_BT)

    def corrected(self) -> Tensor:
        x = self.padded
        weights = importance_weights(x.logprob_BT.detach(), x.behave_BT, x.mask_BT, "token", "truncate", 0.0, 1.1)
        return self.loss(losses.ppo, is_anchored=True, hi=0.28) * weights.weight_BT

    def with_terms(self) -> Tensor:
        x = self.padded
        kl_BT = kl_loss(x.logprob_BT, self.reference_BT, x.mask_BT, 0.1, "k3")
        return self.loss(losses.ppo, hi=0.28) + kl_BT + entropy_bonus(x.entropy_BT, x.mask_BT, 0.02)


@dataclass(frozen=True)
class Case:
    """given: what a recipe says. token_losses, mode: what that must come to."""

    given: dict[str, Any]
    token_losses: Callable[[Batch], Tensor]
    mode: str = "token-mean"


CASES = {
    "grpo": Case({"name": "grpo"}, lambda x: x.loss(losses.ppo, hi=0.28)),
    "dr_grpo": Case({"name": "dr_grpo"}, lambda x: x.loss(losses.ppo), "seq-mean-token-sum-norm"),
    "row sums": Case(
        {"name": "dapo", "aggregate": "seq-mean-token-sum"}, lambda x: x.loss(losses.dapo), "seq-mean-token-sum"
    ),
    "token sum": Case(
        {"name": "cispo", "aggregate": "token-sum"}, lambda x: x.loss(losses.cispo, hi=0.28), "token-sum"
    ),
    "topr": Case({"name": "topr"}, lambda x: x.loss(losses.topr)),
    "gspo": Case({"name": "gspo"}, lambda x: x.loss(losses.gspo), SEQUENCES),
    "sapo": Case({"name": "sapo"}, lambda x: x.loss(losses.sapo), SEQUENCES),
    "gmpo": Case({"name": "gmpo"}, lambda x: x.loss(losses.geo_mean), SEQUENCES),
    "decoupled": Case({"name": "decoupled_ppo"}, Batch.decoupled),
    "corrected": Case(
        {"name": "grpo", "old": "recomputed", "correction": {"mode": "truncate", "high": 1.1}}, Batch.corrected
    ),
    "entropy and KL": Case({"name": "grpo", "entropy_coef": 0.02, "kl": {"coef": 0.1}}, Batch.with_terms),
}

Cut = Callable[[list[Sample]], list[list[Sample]]]
# How rows arrive, and the tokens of a micro-batch.
CUTS: dict[str, tuple[Cut, int]] = {
    "whole": (lambda samples: [samples], 10_000),
    "whole, in small parts": (lambda samples: [samples], 50),
    "streamed by row": (lambda samples: [[sample] for sample in samples], 40),
    "streamed in parts": (lambda samples: [samples[5:], [], samples[:5]], 70),
}


def found_gradients(
    models: Path, world: World, samples: list[Sample]
) -> Iterator[tuple[str, float, dict[str, np.ndarray]]]:
    """On every rank with its samples: "case/cut", loss, gradient. At a rate of next to nothing the optimizer notes the
    gradient and leaves the policy, which serves for all."""
    policy = load_policy(models / "qwen3", world, temperature=TEMPERATURE)
    reference = Reference(models / "other", world, temperature=TEMPERATURE)
    for name, case in CASES.items():
        algorithm = configured(**case.given)
        for cut, (arriving, budget) in CUTS.items():
            train = TrainConfig(learning_rate=1e-30, warmup_steps=0, grad_clip=1e9, micro_batch_tokens=budget)
            given = {"max_response_tokens": LONGEST, "reference": reference if algorithm.kl else None}
            trainer = PolicyTrainer(policy, world, train, algorithm, **given)  # type: ignore[arg-type]
            metrics = update(trainer, *arriving(samples))
            yield f"{name}/{cut}", metrics["actor/pg_loss"], first_gradient(trainer)


def expected_gradients(models: Path, samples: list[Sample]) -> dict[str, tuple[float, dict[str, np.ndarray]]]:
    """Loss and gradient by case, from one padded forward pass in float64 of the model as transformers has it."""
    plain = {"dtype": torch.float64, "attn_implementation": "eager"}
    lm, other = (AutoModelForCausalLM.from_pretrained(models / name, **plain).eval() for name in ("qwen3", "other"))
    advantage_B1 = torch.tensor([[sample.advantage] for sample in samples], dtype=torch.float64)
    with torch.no_grad():
        reference_BT = padded_scores(other, samples).logprob_BT
    batch = Batch(padded_scores(lm, samples), reference_BT, advantage_B1)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    found = {}
    for name, case in CASES.items():
        loss = losses.aggregate(case.token_losses(batch), batch.padded.mask_BT, case.mode, horizon=LONGEST)
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
        found[name] = loss.item(), {key: x.numpy() for key, x in zip(names, gradients, strict=True)}
    return found
