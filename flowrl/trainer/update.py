"""One policy update: streamed, while its batch is still being generated, or from the whole batch where the algorithm
needs that. It knows no queue: `flowrl/stages/train.py` feeds it.

Gradients and loss are accumulated as plain sums; what divides them is known, and applied, at the end of a step. Hence
neither the split into micro-batches nor that over ranks changes the result.

Shapes: B rows, T trained tokens of the longest row, R trained tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch

from flowrl.algorithms.declarations import Streaming
from flowrl.algorithms.kl import is_past_target
from flowrl.config import AlgorithmConfig, TrainConfig
from flowrl.trainer.accumulation import Accumulation
from flowrl.trainer.critic import Critic
from flowrl.trainer.failure import Given
from flowrl.trainer.flops import ModelFlops
from flowrl.trainer.minibatches import minibatches
from flowrl.trainer.model import Policy
from flowrl.trainer.objective import Objective
from flowrl.trainer.optimizer import ShardedAdamW
from flowrl.trainer.packing import PER_TOKEN, MicroBatch, Sample, pack_samples, split_by_tokens
from flowrl.trainer.preparation import LITE_PPO_EPS, Preparation, Prepared, scores
from flowrl.trainer.reference import BaseReference, Reference
from flowrl.trainer.schedule import learning_rate
from flowrl.trainer.scoring import score_responses
from flowrl.trainer.spikes import GradientSpikes
from flowrl.trainer.step_metrics import step_metrics
from flowrl.trainer.totals import Totals, spreads
from flowrl.trainer.world import World
from transfer_queue.rows import RowKey

# Closes every step on every rank: one token, no advantage, no weight.
CLOSING_SAMPLE = Sample(
    key=RowKey("closing", 0, 0),
    prompt_tokens=np.zeros(1, np.int32),
    response_tokens=np.zeros(1, np.int32),
    response_mask=np.ones(1, np.uint8),
    rollout_logprobs=np.zeros(1, np.float32),
    advantage=0.0,
    per_token={name: np.zeros(1, np.float32) for name in PER_TOKEN if name != "advantage"},
)


class PolicyTrainer:
    """begin_update, then accumulate any number of times, then end_update; `step` counts the updates done, which is the
    version of the policy that the next one starts from."""

    def __init__(
        self,
        policy: Policy,
        world: World,
        train: TrainConfig,
        algorithm: AlgorithmConfig,
        *,
        max_response_tokens: int = 1,
        critic: Critic | None = None,
        reference: Reference | BaseReference | None = None,
    ) -> None:
        """max_response_tokens: the most that a response may have, for algorithms that measure against it."""
        self.policy = policy
        self.step = 0
        self.optimizer = ShardedAdamW(
            policy.lm.named_parameters(), beta1=train.beta1, beta2=train.beta2, weight_decay=train.weight_decay
        )
        self.critic = critic
        self._world = world
        self._train = train
        self._algorithm = algorithm
        self._reference = reference
        self._max_response_tokens = max_response_tokens
        self._streaming, _ = algorithm.streaming(train.minibatches, train.epochs)
        needs_old = algorithm.old == "recomputed" and (train.num_steps > 1 or algorithm.m2po is not None)
        self.objective = Objective(
            algorithm,
            max_response_tokens=max_response_tokens,
            has_old=needs_old,
            measures_drift=train.stop_kl is not None,
        )
        self._preparation = Preparation(
            algorithm,
            max_response_tokens=max_response_tokens,
            old=self._logprobs if needs_old else None,
            reference=reference.logprobs if reference is not None else None,
            values=critic.values if critic is not None else None,
        )
        self._accumulation = Accumulation(policy)
        self._opened = ExitStack()
        self._batch: list[Sample] = []
        self._totals = Totals()
        self._given = Given()
        self._flops = ModelFlops.of(policy.lm)
        self.spikes = GradientSpikes()

    def begin_update(self) -> None:
        """On every rank: gathers the parameters."""
        self._batch = []
        self._begin_step()
        if self._reference is not None:
            self._opened.enter_context(self._reference.opened())

    def abandon_update(self) -> None:
        """On every rank, instead of ending it: the trainer is as before it, to be saved but not to go on."""
        self._opened.close()
        self._accumulation.abandon()
        self._batch = []

    def accumulate(self, samples: Sequence[Sample]) -> None:
        """Adds these samples to the update: their gradient at once, or, where the whole batch is needed, at its end.
        Free of collectives: ranks may differ in how often they call it."""
        if self._streaming is Streaming.WAITS:
            self._batch += samples
        elif self._reference is not None:
            self._accumulate(self._preparation.prepare(samples, self.objective.kl_coef.value).samples)
        else:
            self._accumulate(samples)

    def end_update(self) -> dict[str, float]:
        """On every rank: sums gradients, divides by the denominator of the global batch, clips, steps; as often as
        `train` has minibatches and epochs.

        Returns the metrics, equal on all ranks. Raises NonFiniteUpdate, on all ranks, before that step is taken.
        """
        steps: list[dict[str, float]] = []
        measured: dict[str, float] = {}
        if self._streaming is not Streaming.WAITS:
            self._opened.close()
            steps.append(self._end_step())
        else:
            prepared = self._preparation.prepare(self._batch, self.objective.kl_coef.value)
            self._opened.close()
            measured = self._prepared_metrics(prepared)
            for number, places in enumerate(self._minibatches(prepared.samples)):
                if number and self._is_far(steps[-1]):
                    break
                steps.append(self._train_minibatch(prepared, places, is_first=not number))
        self._batch = []
        self.step += 1
        found = step_metrics(steps) | measured
        for name in ("actor/pg_loss", "actor/grad_norm", "actor/lr"):
            found[name] = sum(step[name] for step in steps) / len(steps)
        found["actor/grad_spikes"] = float(self.spikes.num)
        if len(steps) > 1:
            found["training/steps"] = float(len(steps))
        self._adapt_kl(found)
        return found

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

    def _train_minibatch(self, prepared: Prepared, places: Sequence[int], *, is_first: bool) -> dict[str, float]:
        if not is_first:
            self._begin_step()
        self._accumulate([prepared.samples[place] for place in places])
        found = self._end_step()
        if self.critic is None:
            return found
        self.critic.step = self.step  # its schedule goes by updates, however many steps they have
        self.critic.begin_update()
        returns, values = ([rows[place] for place in places] for rows in (prepared.returns, prepared.values))
        self.critic.accumulate([prepared.samples[place] for place in places], returns, values)
        return found | self.critic.end_update()

    def _minibatches(self, samples: Sequence[Sample]) -> list[list[int]]:
        """Places in `samples` for every step of the update."""
        train = self._train
        return minibatches(samples, train.minibatches, train.epochs, seed=(train.seed, self.step))

    def _is_far(self, step: dict[str, float]) -> bool:
        target = self._train.stop_kl
        return target is not None and is_past_target(step["actor/k3_kl"] / max(1.0, step["forward_tokens"]), target)

    def _begin_step(self) -> None:
        self._accumulation.begin()
        self._totals = Totals()
        self._given = Given()

    def _accumulate(self, samples: Sequence[Sample]) -> None:
        """Adds the gradient, in micro-batches. Rows left out of the forward pass are counted all the same."""
        trained = [sample.num_trained_tokens for sample in samples]
        self._given.samples += samples
        self._measure_rewards(samples)
        self._totals.add("tokens", float(sum(trained)))
        self._totals.add("rows", float(sum(1 for count in trained if count)))
        if self._streaming is Streaming.SCALED:
            self._add_scores(samples)
        kept = [
            sample
            for sample, count in zip(samples, trained, strict=True)
            if count and not self._is_without_effect(sample)
        ]
        lengths = [len(sample.prompt_tokens) + len(sample.response_tokens) - 1 for sample in kept]
        for part in split_by_tokens(lengths, self._train.micro_batch_tokens):
            chosen = [kept[index] for index in part]
            num_targets = sum(sample.num_trained_tokens for sample in chosen)
            self._totals.add("flops", self._flops.training([lengths[index] for index in part], num_targets))
            micro_batch = pack_samples(chosen, self._world.device, self.objective.columns)
            self._given.add(micro_batch.keys, self._backward(micro_batch, weight=1.0))

    def _is_without_effect(self, sample: Sample) -> bool:
        """No term of the loss reaches a parameter."""
        if not self._algorithm.skip_tied or self._algorithm.has_terms_without_advantage:
            return False
        advantage = sample.per_token.get("advantage")
        return sample.advantage == 0.0 if advantage is None else not advantage.any()

    def _measure_rewards(self, samples: Sequence[Sample]) -> None:
        """Scores, shaped; where a KL is taken off them, the preparation measures what is left."""
        if not self._algorithm.estimates_in_trainer:
            self._totals.measure("critic/rewards", scores(samples, self._algorithm, self._max_response_tokens).numpy())

    def _add_scores(self, samples: Sequence[Sample]) -> None:
        score_B = scores(samples, self._algorithm, self._max_response_tokens).double()
        self._totals.add("scores", float(len(score_B)))
        self._totals.add("score_sum", score_B.sum())
        self._totals.add("score_square_sum", score_B.square().sum())

    def _end_step(self) -> dict[str, float]:
        """-> the step's totals, and its loss, gradient norm and rate."""
        closing = pack_samples([CLOSING_SAMPLE], self._world.device, self.objective.columns)
        self._accumulation.close(lambda: self._close(closing))
        self._totals.add("grad_square_sum", self.optimizer.gradient_square_sum())
        totals = self._totals.reduce(self._world)
        denominator = self._denominator(totals)
        grad_norm = math.sqrt(totals["grad_square_sum"]) / denominator
        loss = totals["loss"] / denominator
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.drop_gradients()
            raise self._given.failure(f"update {self.step}", loss, grad_norm)
        rate = self.learning_rate()
        clip = min(1.0, self._train.grad_clip / (grad_norm + 1e-6))
        self.optimizer.step(clip / denominator, rate)
        self.spikes.add(grad_norm)
        return totals | {"actor/pg_loss": loss, "actor/grad_norm": grad_norm, "actor/lr": rate}

    def _close(self, closing: MicroBatch) -> None:
        for name in ("tokens", "rows", "flops"):
            self._totals.add(name, 0.0)
        self._measure_rewards([])
        if self._streaming is Streaming.SCALED:
            self._add_scores([])
        self._backward(closing, weight=0.0)

    def _backward(self, micro_batch: MicroBatch, weight: float) -> torch.Tensor:
        """Forward and backward; adds to the totals. Returns each row's loss for the search of culprits."""
        packed = micro_batch.packed
        logprob_R, entropy_R = self.policy(packed)
        loss_BT, metrics = self.objective.token_losses(micro_batch, logprob_R, entropy_R, self.step)
        loss = weight * self.objective.total(loss_BT, packed.mask_BT())
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

    def _logprobs(self, samples: Sequence[Sample]) -> list[np.ndarray]:
        """Under the parameters that are gathered now."""
        budget, device = self._train.micro_batch_tokens, self._world.device
        return score_responses(lambda packed: self.policy(packed)[0], samples, budget, device)

    def _denominator(self, totals: dict[str, float]) -> float:
        """What the aggregate divides by, over all ranks; 1 for a batch without a trained token. Times the deviation of
        the scores, where advantages are still to be divided by it."""
        if self._algorithm.aggregate == "token-sum":
            denominator = 1.0
        else:
            denominator = max(1.0, totals["tokens" if self._algorithm.aggregate == "token-mean" else "rows"])
        if self._streaming is not Streaming.SCALED:
            return denominator
        count = max(1.0, totals["scores"])
        squares = max(0.0, totals["score_square_sum"] - totals["score_sum"] ** 2 / count)
        eps = float(self._algorithm.advantage_settings.get("eps", LITE_PPO_EPS))
        return denominator * (math.sqrt(squares / max(1.0, count - 1)) + eps)

    def _prepared_metrics(self, prepared: Prepared) -> dict[str, float]:
        """Over all ranks."""
        totals = Totals()
        for name, values in prepared.measured.items():
            totals.measure(name, values.numpy())
        if not prepared.measured:
            return {}
        found = spreads(totals.reduce(self._world))
        kl = {name: value for name, value in found.items() if name.startswith("actor/reward_kl/")}
        means = {name.removesuffix("/mean"): value for name, value in kl.items() if name.endswith("/mean")}
        return {name: value for name, value in found.items() if name not in kl} | means

    def _adapt_kl(self, found: dict[str, float]) -> None:
        if self._algorithm.kl is None:
            return
        found["actor/kl_coef"] = self.objective.kl_coef.value
        mean = found["actor/kl" if self._algorithm.kl.place == "loss" else "actor/reward_kl"]
        self.objective.kl_coef.update(mean, int(found["training/num_rows"]) // self._train.epochs)
