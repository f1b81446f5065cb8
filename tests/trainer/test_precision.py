"""bfloat16 passes, float32 sums and masters; activations that are not kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from flowrl.config import CriticConfig, TrainConfig
from flowrl.trainer.critic import Critic
from flowrl.trainer.packing import pack_samples
from flowrl.trainer.world import World
from tests.trainer.cases import distance, first_gradient, make_samples, make_trainer, reference, update
from transfer_queue.rows import RowKey

SAMPLES = make_samples(24)


def test_gradient_of_bfloat16_passes_points_where_the_exact_one_does(world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world, compute_dtype="bfloat16")
    update(trainer, SAMPLES)
    assert distance(first_gradient(trainer), reference(model_dir, SAMPLES, "token-mean")[1]) < 0.05


def test_gradients_of_many_bfloat16_micro_batches_are_summed_in_float32(world: World, model_dir: Path) -> None:
    gradients = []
    for copies in (1, 64):
        trainer = make_trainer(model_dir, world, compute_dtype="bfloat16", budget=1)
        update(trainer, [replace(SAMPLES[0], key=RowKey("train", 0, index)) for index in range(copies)])
        gradients.append(first_gradient(trainer))
    # The mean over equal rows is that of one; a sum in bfloat16 would be off by a part in a hundred.
    assert distance(gradients[1], gradients[0]) < 1e-4


def test_masters_move_by_steps_that_bfloat16_cannot_hold(world: World, model_dir: Path) -> None:
    trainer = make_trainer(model_dir, world, compute_dtype="bfloat16", rate=1e-7)
    before = {name: tensor.full_tensor().clone() for name, tensor in trainer.policy.lm.named_parameters()}
    update(trainer, SAMPLES)
    name = "model.layers.0.input_layernorm.weight"  # ones, next to which 1e-7 is nothing in bfloat16
    after = dict(trainer.policy.lm.named_parameters())[name].full_tensor()
    assert after.dtype == torch.float32 and not torch.equal(after, before[name])
    assert torch.equal(after.bfloat16(), before[name].bfloat16())
    assert all(moment.dtype == torch.float32 for moment in trainer.optimizer.state_dict().values())


def test_head_of_the_critic_computes_in_float32_whatever_the_rest_does(world: World, model_dir: Path) -> None:
    train = TrainConfig(compute_dtype="bfloat16", warmup_steps=0, micro_batch_tokens=64)
    critic = Critic(model_dir, world, train, CriticConfig())
    critic.model.head.weight.detach().to_local().fill_(1.0)
    seen: dict[str, torch.dtype] = {}

    def watch(module: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        seen.update(input=inputs[0].dtype, weight=module.weight.dtype, output=output.dtype)

    critic.model.head.register_forward_hook(watch)
    values = critic.values(SAMPLES[:2])
    assert set(seen.values()) == {torch.float32}
    assert all(np.isfinite(value).all() and value.any() for value in values)


def test_recomputing_keeps_a_fraction_of_the_activations(world: World, model_dir: Path) -> None:
    kept_bytes = []
    for recompute in (False, True):
        policy = make_trainer(model_dir, world, activation_checkpointing=recompute).policy
        own = {parameter.full_tensor().data_ptr() for parameter in policy.parameters()}
        total = 0

        def count(tensor: torch.Tensor, own: set[int] = own) -> torch.Tensor:
            nonlocal total
            total += 0 if tensor.data_ptr() in own else tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            policy(pack_samples(SAMPLES[4:], world.device).packed)
        kept_bytes.append(total)
    assert kept_bytes[1] < 0.4 * kept_bytes[0]
