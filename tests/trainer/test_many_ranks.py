"""Whatever the architecture and however many ranks: what a padded model in float64 says, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM

from flowrl.trainer.checkpoint import latest, load
from flowrl.trainer.lora import add_adapters
from flowrl.trainer.packing import Sample
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from tests.trainer.architectures import ARCHITECTURES
from tests.trainer.cases import (
    distance,
    make_returns,
    make_samples,
    padded_loss,
    padded_scores,
    padded_tokens,
    reference,
)
from tests.trainer.ladder import SIZES, Ladder
from tests.trainer.ladder_process import (
    ADAPTED,
    LORA,
    MATRIX_ROWS,
    NUM_ROWS,
    VARIANTS,
    make_trainer_with_critic,
    update_both,
)
from tests.trainer.loss_matrix import CASES, CUTS, expected_gradients

SAMPLES = make_samples(NUM_ROWS)
# Whoever comes first climbs; up to seven processes share what cores there are.
pytestmark = pytest.mark.timeout(240)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("size", SIZES)
def test_loss_and_gradient_are_those_of_a_padded_batch(size: int, name: str, ladder: Ladder) -> None:
    loss, gradient = reference(ladder.models / name, SAMPLES, "token-mean")
    for rank in range(size):
        metrics = json.loads((ladder.rung(size) / f"{name}-{rank}.json").read_text())
        assert metrics["actor/pg_loss"] == pytest.approx(loss, rel=1e-5)
        assert distance(dict(np.load(ladder.rung(size) / f"{name}-{rank}.npz")), gradient) < 1e-5


@pytest.fixture(scope="module")
def expected(ladder: Ladder) -> dict[str, tuple[float, np.ndarray]]:
    """Loss and gradient by case, from a padded pass."""
    found = expected_gradients(ladder.models, make_samples(MATRIX_ROWS))
    return {
        name: (loss, np.concatenate([gradient[key].reshape(-1) for key in sorted(gradient)]))
        for name, (loss, gradient) in found.items()
    }


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("name", CASES)
def test_whatever_the_loss_and_however_the_batch_is_cut_its_gradient_is_that_of_the_padded_batch(
    name: str, cut: str, expected: dict[str, tuple[float, np.ndarray]], ladder: Ladder
) -> None:
    loss, gradient = expected[name]
    for size in SIZES:
        for rank in range(size):
            found, losses = ladder.matrix(size, rank)
            assert losses[f"{name}/{cut}"] == pytest.approx(loss, rel=1e-5)
            assert np.linalg.norm(found[f"{name}/{cut}"] - gradient) < 1e-5 * np.linalg.norm(gradient)


@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputing_or_offloading_changes_no_gradient(variant: str, ladder: Ladder) -> None:
    for size in SIZES:
        expected = dict(np.load(ladder.rung(size) / "qwen3-0.npz"))
        assert distance(dict(np.load(ladder.rung(size) / f"{variant}-0.npz")), expected) < 1e-5


@pytest.mark.parametrize("name", ADAPTED)
def test_adapters_train_as_in_a_plain_loop_and_are_published_merged(name: str, ladder: Ladder) -> None:
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    lm = AutoModelForCausalLM.from_pretrained(ladder.models / name, dtype=torch.float32, **plain)
    before = {key: tensor.double() for key, tensor in lm.state_dict().items()}
    add_adapters(lm, LORA)
    lm.double().eval()
    adapters = {key: tensor for key, tensor in lm.named_parameters() if tensor.requires_grad}
    assert adapters and all(".lora_" in key for key in adapters)
    adam = torch.optim.AdamW(adapters.values(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for seed in range(3):
        adam.zero_grad()
        padded_loss(lm, make_samples(NUM_ROWS, seed=seed), "token-mean").backward()
        adam.step()
    expected = dict(before)
    for key in (key for key in adapters if ".lora_A." in key):
        product = adapters[key.replace("lora_A", "lora_B")] @ adapters[key] * 2.0
        module = key.split(".lora_A.")[0]
        expected[f"{module}.weight"] = before[f"{module}.weight"] + (product.T if name == "gpt2" else product)
    for size in SIZES if name == ADAPTED[0] else SIZES[:2]:
        found = load_file(ladder.rung(size) / f"merged-{name}-{size - 1}.safetensors")
        assert set(found) == set(before)
        change = {key: (tensor - before[key]).numpy() for key, tensor in found.items()}
        exact = {key: (tensor - before[key]).detach().numpy() for key, tensor in expected.items()}
        assert distance(change, exact) < 1e-3


@pytest.mark.parametrize("size", SIZES)
def test_reference_logprobs_equal_a_padded_forward_pass(size: int, ladder: Ladder) -> None:
    path = ladder.models / "qwen3"
    lm = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
    with torch.no_grad():
        logprob_BT = padded_scores(lm, SAMPLES).logprob_BT
    for name in ("together", "alone"):
        scores = ladder.arrays(size, name)
        for score, sample, expected in zip(scores, SAMPLES, logprob_BT.numpy(), strict=True):
            assert score.dtype == np.float32 and len(score) == len(sample.response_tokens)
            np.testing.assert_allclose(score, expected[: len(score)], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(ladder.arrays(size, "again")[0], ladder.arrays(size, "alone")[0])


def padded_values(path: Path, samples: list[Sample]) -> tuple[torch.nn.Module, torch.nn.Linear, torch.Tensor]:
    """(backbone, head, value_BT) in float64: the hidden state where a token is predicted, times 0.05, summed."""
    backbone = AutoModel.from_pretrained(path, dtype=torch.float64, attn_implementation="eager").eval()
    head = torch.nn.Linear(backbone.config.hidden_size, 1, dtype=torch.float64)
    torch.nn.init.constant_(head.weight, 0.05)
    torch.nn.init.zeros_(head.bias)
    token_BL, seen_BL = padded_tokens(samples)
    value_BL = head(backbone(token_BL, attention_mask=seen_BL).last_hidden_state)[..., 0]
    num_columns = max(len(sample.response_tokens) for sample in samples)
    rows = []
    for row, sample in enumerate(samples):
        start, length = len(sample.prompt_tokens) - 1, len(sample.response_tokens)
        rows.append(torch.nn.functional.pad(value_BL[row, start : start + length], (0, num_columns - length)))
    return backbone, head, torch.stack(rows)


def test_values_and_value_gradient_are_those_of_a_padded_batch_on_any_number_of_ranks(ladder: Ladder) -> None:
    backbone, head, value_BT = padded_values(ladder.models / "qwen3", SAMPLES)
    mask_BT, return_BT, old_BT = (torch.zeros_like(value_BT) for _ in range(3))
    for row, (sample, returns, old) in enumerate(zip(SAMPLES, *make_returns(SAMPLES), strict=True)):
        mask_BT[row, : len(returns)] = torch.from_numpy(sample.response_mask.astype(np.float64))
        return_BT[row, : len(returns)] = torch.from_numpy(returns.astype(np.float64))
        old_BT[row, : len(old)] = torch.from_numpy(old.astype(np.float64))
    clipped_BT = torch.minimum(torch.maximum(value_BT, old_BT - 0.5), old_BT + 0.5)
    plain_BT, other_BT = (value_BT - return_BT) ** 2, (clipped_BT - return_BT) ** 2
    loss = 0.5 * (torch.maximum(plain_BT, other_BT) * mask_BT).sum() / mask_BT.sum()
    loss.backward()
    gradient = {f"backbone.{name}": parameter.grad.numpy() for name, parameter in backbone.named_parameters()}
    gradient |= {"head.weight": head.weight.grad.numpy(), "head.bias": head.bias.grad.numpy()}
    norm = sum(float(np.square(value).sum()) for value in gradient.values()) ** 0.5
    error, target = ((x[mask_BT > 0]).detach() for x in (return_BT - value_BT, return_BT))
    num_clipped = int((other_BT > plain_BT)[mask_BT > 0].sum())
    for size in SIZES:
        for value, expected in zip(ladder.arrays(size, "values"), value_BT.detach().numpy(), strict=True):
            np.testing.assert_allclose(value, expected[: len(value)], rtol=1e-4, atol=1e-5)
        for rank in range(size):
            assert distance(dict(np.load(ladder.rung(size) / f"critic-{rank}.npz")), gradient) < 1e-5
            metrics = json.loads((ladder.rung(size) / f"critic-{rank}.json").read_text())
            assert metrics["critic/vf_loss"] == pytest.approx(loss.item(), rel=1e-5)
            assert metrics["critic/grad_norm"] == pytest.approx(norm, rel=1e-5)
            explained = 1 - (error.var() / target.var()).item()
            assert metrics["critic/vf_explained_var"] == pytest.approx(explained, rel=1e-4)
            # A token more or less: in float32 a value that is not clipped may come back an ulp away from itself.
            assert abs(metrics["critic/vf_clipfrac"] * len(target) - num_clipped) <= 2


def test_checkpoint_climbs_from_one_rank_to_four_and_back(ladder: Ladder, world: World) -> None:
    """Policy, critic, and the moments of both."""
    uninterrupted = make_trainer_with_critic(ladder.models / "qwen3", world)
    start = parameters(uninterrupted)
    for step in range(3):
        update_both(uninterrupted, make_samples(NUM_ROWS, seed=100 + step), slice(None))
    resumed = make_trainer_with_critic(ladder.models / "qwen3", world)
    path = latest(ladder.rung(4) / "checkpoints")
    assert path is not None and load(path, resumed) == {"rung": 4} and resumed.step == 3
    for trainer in (uninterrupted, resumed):
        update_both(trainer, make_samples(NUM_ROWS, seed=103), slice(None))
    for kind in ("policy", "critic"):
        found, other = (
            {name: value - start[name] for name, value in parameters(trainer).items() if name.startswith(kind)}
            for trainer in (resumed, uninterrupted)
        )
        assert distance(found, other) < 1e-3


def parameters(trainer: PolicyTrainer) -> dict[str, np.ndarray]:
    assert trainer.critic is not None
    models = {"policy": trainer.policy, "critic": trainer.critic.model}
    return {
        f"{kind}.{name}": parameter.full_tensor().detach().numpy().copy()
        for kind, model in models.items()
        for name, parameter in model.named_parameters()
    }
