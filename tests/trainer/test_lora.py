"""Adapters: what is trained, what is saved, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from flowrl.config import LoRAConfig, TrainConfig
from flowrl.config.presets import configured
from flowrl.trainer.checkpoint import load, save
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import pack
from flowrl.trainer.reference import BaseReference, Reference
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from flowrl.weights.publish import Publisher
from tests.trainer.cases import TEMPERATURE, make_samples, make_trainer, update

SAMPLES = make_samples(8)
LORA = LoRAConfig(rank=4, alpha=8.0, targets=["q_proj", "down_proj"])


def test_only_adapters_of_the_targets_are_trained_and_saved(world: World, model_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model_dir, world, lora=LORA)
    before = {name: tensor.full_tensor().clone() for name, tensor in trainer.policy.lm.named_parameters()}
    update(trainer, SAMPLES)
    update(trainer, SAMPLES)
    after = {name: tensor.full_tensor() for name, tensor in trainer.policy.lm.named_parameters()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapters = {name for name in before if ".lora_" in name}
    assert changed == adapters and len(adapters) == 2 * 2 * 2
    assert all("q_proj" in name or "down_proj" in name for name in adapters)
    path = save(tmp_path, trainer, world, extra={}, keep=1)
    assert sum(file.stat().st_size for file in path.iterdir()) < 10 * sum(after[name].nbytes for name in adapters) + 2e5


def test_published_model_gives_the_log_probs_that_were_trained(world: World, model_dir: Path, tmp_path: Path) -> None:
    trainer = make_trainer(model_dir, world, lora=LORA, rate=1e-2)
    for _ in range(3):
        update(trainer, SAMPLES)
    path = save(tmp_path / "checkpoints", trainer, world, extra={}, keep=1)
    resumed = make_trainer(model_dir, world, lora=LORA)
    load(path, resumed)
    out = tmp_path / "model"
    Publisher(resumed.policy.published, model_dir, None, "float32").export(out)
    assert set(load_file(out / "model.safetensors")) == set(load_file(model_dir / "model.safetensors"))
    prompt, response = SAMPLES[0].prompt_tokens, SAMPLES[0].response_tokens
    packed = pack([prompt], [response], [SAMPLES[0].response_mask], world.device)
    with torch.no_grad():
        trained_R, _ = trainer.policy(packed)
        served, base = (AutoModelForCausalLM.from_pretrained(path) for path in (out, model_dir))
        hidden = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
        tokens = torch.tensor([[*prompt.tolist(), *response.tolist()]])
        logprob_RV, base_RV = ((lm(tokens).logits[0, hidden] / TEMPERATURE).log_softmax(-1) for lm in (served, base))
    kept = torch.from_numpy(SAMPLES[0].response_mask.astype(bool))
    at = torch.arange(len(response))[kept], torch.from_numpy(response.astype("int64"))[kept]
    torch.testing.assert_close(trained_R, logprob_RV[at], rtol=1e-4, atol=1e-5)
    assert (trained_R - base_RV[at]).abs().max() > 1e-2


def test_base_under_the_adapters_is_a_reference_that_costs_no_memory(world: World, model_dir: Path) -> None:
    """Scores and gradients are those with a model of its own, whichever way the update takes its batch."""
    train = TrainConfig(learning_rate=1e-2, warmup_steps=0, grad_clip=1e9, micro_batch_tokens=64)
    for place in ("loss", "reward"):
        algorithm = configured("grpo", kl={"coef": 0.2, "place": place})
        parameters = []
        for has_own in (True, False):
            policy = load_policy(model_dir, world, temperature=TEMPERATURE, lora=LORA)
            reference: Reference | BaseReference = BaseReference(policy, world, micro_batch_tokens=64)
            if has_own:
                reference = Reference(model_dir, world, temperature=TEMPERATURE, micro_batch_tokens=64)
            trainer = PolicyTrainer(policy, world, train, algorithm, max_response_tokens=20, reference=reference)
            metrics = [update(trainer, SAMPLES[:3], SAMPLES[3:]) for _ in range(3)]
            assert metrics[-1]["actor/kl" if place == "loss" else "actor/reward_kl"] > 0
            parameters.append(torch.cat([p.full_tensor().flatten() for p in policy.parameters() if p.requires_grad]))
        torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-4, atol=1e-5)


def test_target_that_no_module_has_is_refused(world: World, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.lora\.targets: \['no_such'\]"):
        make_trainer(model_dir, world, lora=LoRAConfig(targets=["no_such"]))


def test_published_tensors_are_sharded_like_the_model(world: World, model_dir: Path) -> None:
    policy = make_trainer(model_dir, world, lora=LORA).policy
    assert all(isinstance(tensor, DTensor) for tensor in policy.published.state_dict().values())


@pytest.mark.parametrize("field", [{"rank": 0}, {"alpha": 0.0}, {"targets": []}])
def test_settings_that_make_no_sense_are_refused_by_name(field: dict) -> None:
    with pytest.raises(ValueError, match=rf"model\.lora\.{next(iter(field))}"):
        LoRAConfig(**field)
