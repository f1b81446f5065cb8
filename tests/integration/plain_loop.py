"""GRPO as a plain loop: no queue, no controllers, no versions. `python -m tests.integration.plain_loop RECIPE OUT`.

sample the batch -> score it -> advantages -> one update -> again, with the same engine core and trainer that a run
uses, in one process. Writes the final weights to OUT/model.safetensors and each step's metrics to OUT/metrics.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from flowrl.algorithms import advantages
from flowrl.config import Recipe, load
from flowrl.data.datasets import load_splits
from flowrl.data.order import prompt_at
from flowrl.data.prompts import PromptEncoder
from flowrl.determinism import fix_kernels
from flowrl.rewards.function import load_reward
from flowrl.rollout.embedded.core import EmbeddedCore
from flowrl.rollout.engine import FinishReason, GenerateRequest, PauseMode, SamplingParams
from flowrl.stages.rollout import sample_seed
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Sample
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World, join
from transfer_queue.rows import RowKey


class PlainLoop:
    def __init__(self, recipe: Recipe, world: World) -> None:
        self.recipe = recipe
        self.encoder = PromptEncoder(recipe.model.path, recipe.data.max_prompt_tokens)
        self.examples = load_splits(recipe.data, recipe.eval).train
        self.encoded = self.encoder.encode_all(self.examples)
        self.reward = load_reward(recipe.reward, Path.cwd())
        self.policy = load_policy(recipe.model.path, world, temperature=recipe.rollout.temperature)
        self.trainer = PolicyTrainer(self.policy, world, recipe.train, recipe.algorithm)
        longest = max(map(len, self.encoded.prompts))
        self.core = EmbeddedCore(
            Path(recipe.model.path),
            0,
            max_batch=recipe.rollout.concurrency * recipe.rollout.group_size,
            max_model_tokens=longest + recipe.rollout.max_tokens,
        )

    def update(self, number: int) -> dict[str, float]:
        recipe = self.recipe
        groups = range(number * recipe.train.batch_groups, (number + 1) * recipe.train.batch_groups)
        keys = [RowKey("train", group, index) for group in groups for index in range(recipe.rollout.group_size)]
        places = [prompt_at(key.group, len(self.encoded.prompts), recipe.train.seed) for key in keys]
        prompts = [self.encoded.prompts[place] for place in places]
        generations = self.core.generate_all(
            GenerateRequest(request_id=str(key), tokens=prompt, sampling=self.sampling(key))
            for key, prompt in zip(keys, prompts, strict=True)
        )
        examples = [self.examples[self.encoded.indices[place]] for place in places]
        scores = self.reward(examples, [self.encoder.decode(generation.tokens) for generation in generations])
        score_B = np.array([score.value for score in scores], dtype=np.float32)
        group_B = torch.tensor([key.group for key in keys])
        advantage_B = advantages.grpo(torch.from_numpy(score_B), group_B)
        samples = [
            Sample(
                key=key,
                prompt_tokens=np.array(prompt, np.int32),
                response_tokens=generation.tokens,
                response_mask=np.ones(len(generation.tokens), np.uint8),
                rollout_logprobs=generation.logprobs,
                advantage=float(advantage),
                reward=float(score),
            )
            for key, prompt, generation, advantage, score in zip(
                keys, prompts, generations, advantage_B, score_B, strict=True
            )
        ]
        self.trainer.begin_update()
        self.trainer.accumulate(samples)
        metrics = self.trainer.end_update()
        self.core.load(self.state(), version=number + 1, mode=PauseMode.ABORT)
        cut = sum(generation.finish_reason is FinishReason.LENGTH for generation in generations)
        tied = sum(len(set(score_B[group_B.numpy() == group].tolist())) == 1 for group in groups)
        return {
            **metrics,
            **spread("critic/score", score_B),
            **spread("critic/advantages", advantage_B.numpy()),
            **spread("response_length", [len(generation.tokens) for generation in generations]),
            **spread("prompt_length", [len(prompt) for prompt in prompts]),
            # What samples and what is trained take turns here: nothing is stale, and nothing is of two versions.
            **spread("training/off_policy/trajectory_staleness", np.zeros(len(keys))),
            **spread("training/off_policy/trajectory_spans", np.ones(len(keys))),
            "response_length/clip_ratio": cut / len(keys),
            "frac_reward_zero_std": tied / len(groups),
        }

    def sampling(self, key: RowKey) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.recipe.rollout.max_tokens,
            temperature=self.recipe.rollout.temperature,
            stop_token_ids=self.encoder.stop_token_ids,
            seed=sample_seed(self.recipe.train.seed, key),
        )

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().to_local() for name, tensor in self.policy.lm.state_dict().items()}


def spread(name: str, values: Sequence[float] | np.ndarray) -> dict[str, float]:
    values = np.asarray(values, np.float64)
    return {
        f"{name}/mean": float(values.sum()) / len(values),
        f"{name}/max": float(values.max()),
        f"{name}/min": float(values.min()),
    }


def main(recipe_path: str, out: str) -> None:
    recipe = load(recipe_path)
    fix_kernels(recipe)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as meeting, join(rank=0, world_size=1, file=Path(meeting) / "world") as world:
        loop = PlainLoop(recipe, world)
        metrics = [loop.update(number) for number in range(recipe.train.steps)]
        save_file({name: tensor.contiguous() for name, tensor in loop.state().items()}, f"{out}/model.safetensors")
    (Path(out) / "metrics.json").write_text(json.dumps(metrics))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
