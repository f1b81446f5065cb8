"""The warm start: supervised steps on demonstrations until the development set says that it is enough.

Runs in the trainer's process before the first update; the held-out set has no part in it. All ranks leave at the same
step, because they compute the same accuracy from the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from controllers.context import WorkerContext
from flowrl.config import Recipe, WarmStartConfig
from flowrl.data.datasets import load_splits
from flowrl.data.prompts import PromptEncoder
from flowrl.rewards.function import load_reward
from flowrl.rollout.embedded.core import EmbeddedCore
from flowrl.rollout.engine import GenerateRequest, PauseMode, SamplingParams
from flowrl.trainer.model import Policy
from flowrl.trainer.packing import Demonstration
from flowrl.trainer.supervised import SupervisedTrainer
from flowrl.trainer.world import World
from flowrl.weights.publish import Publisher


def warm_start(
    context: WorkerContext, recipe: Recipe, policy: Policy, whole: Callable[[], Publisher], world: World
) -> None:
    """Trains `policy` in place. whole: a publisher of all of it, as it is at the time."""
    settings = recipe.warm_start
    assert settings is not None, "the graph has this stage only for recipes that ask for it"
    encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens)
    development = DevelopmentSet(recipe, encoder)
    trainer = SupervisedTrainer(policy, world, recipe.train, settings.learning_rate)
    batches = demonstration_batches(recipe, encoder, settings, world)
    for step in range(1, settings.max_steps + 1):
        measured = trainer.step(next(batches))
        if step % settings.check_every and step < settings.max_steps:
            continue
        accuracy = development.accuracy(whole().full_state())
        if world.rank == 0:
            context.report(measured | {"sft/dev_accuracy": accuracy, "sft/step": float(step)})
            context.log(f"warm start: {step} steps, development accuracy {accuracy:.1%}")
        if accuracy >= settings.until_accuracy:
            return


class DevelopmentSet:
    """Greedy accuracy on `data.dev` prompts, by an embedded engine in this process."""

    def __init__(self, recipe: Recipe, encoder: PromptEncoder) -> None:
        examples = load_splits(recipe.data, recipe.eval).dev
        encoded = encoder.encode_all(examples)
        self.examples = [examples[index] for index in encoded.indices]
        self.encoder = encoder
        self.reward = load_reward(recipe.reward, Path.cwd())
        sampling = SamplingParams(
            max_tokens=recipe.rollout.max_tokens, temperature=0.0, stop_token_ids=encoder.stop_token_ids
        )
        self.requests = [
            GenerateRequest(request_id=str(index), tokens=prompt, sampling=sampling)
            for index, prompt in enumerate(encoded.prompts)
        ]
        longest = max(map(len, encoded.prompts))
        self.core = EmbeddedCore(
            Path(recipe.model.path), version=-1, max_model_tokens=longest + recipe.rollout.max_tokens
        )

    def accuracy(self, state: dict[str, torch.Tensor]) -> float:
        self.core.load(state, version=self.core.version + 1, mode=PauseMode.ABORT)
        generations = self.core.generate_all(self.requests)
        responses = [self.encoder.decode(generation.tokens) for generation in generations]
        scores = self.reward(self.examples, responses)
        return float(np.mean([score.accuracy for score in scores]))


def demonstration_batches(
    recipe: Recipe, encoder: PromptEncoder, settings: WarmStartConfig, world: World
) -> Iterator[list[Demonstration]]:
    """This rank's share of every batch, in an order that is the same wherever it is drawn.

    Raises ValueError if the data has no demonstrations.
    """
    train = load_splits(recipe.data, recipe.eval).train
    encoded = encoder.encode_all(train)
    pairs = [
        (prompt, demonstration)
        for prompt, index in zip(encoded.prompts, encoded.indices, strict=True)
        if (demonstration := train[index].demonstration) is not None
    ]
    if not pairs:
        raise ValueError("warm_start: the data has no demonstrations (answers) to imitate")
    shuffle = np.random.default_rng((recipe.train.seed, 1))
    while True:
        chosen = shuffle.choice(len(pairs), size=min(settings.batch_rows, len(pairs)), replace=False)
        yield [
            Demonstration(
                np.array(pairs[place][0], np.int32), np.array(encoder.encode_response(pairs[place][1]), np.int32)
            )
            for place in chosen[world.rank :: world.size]
        ]
