"""Small models and batches for the trainer's tests, and a reference gradient that shares nothing with the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from flowrl.config import AlgorithmConfig, TrainConfig
from flowrl.trainer.critic import Critic
from flowrl.trainer.model import load_policy
from flowrl.trainer.packing import Sample
from flowrl.trainer.update import PolicyTrainer
from flowrl.trainer.world import World
from transfer_queue.rows import RowKey

VOCABULARY = 48
TEMPERATURE = 0.8


def make_model(path: Path, *, tied: bool = True) -> Path:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=64,
        max_position_embeddings=128,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=1,
    )
    Qwen3ForCausalLM(config).save_pretrained(path)
    return path


def make_samples(num_rows: int, seed: int = 0, *, longest: int = 20) -> list[Sample]:
    """Rows of many lengths; a quarter tied, some tokens masked, one row with no trained token."""
    draw = np.random.default_rng(seed)
    samples = []
    for index in range(num_rows):
        num_prompt, num_response = draw.integers(1, longest), draw.integers(1, longest)
        mask = (draw.random(num_response) < 0.8).astype(np.uint8)
        mask[0] = index != 3
        samples.append(
            Sample(
                key=RowKey("train", index // 4, index % 4),
                prompt_tokens=draw.integers(0, VOCABULARY, num_prompt).astype(np.int32),
                response_tokens=draw.integers(0, VOCABULARY, num_response).astype(np.int32),
                response_mask=mask if index != 3 else np.zeros_like(mask),
                rollout_logprobs=(-3.9 + 0.3 * draw.normal(size=num_response)).astype(np.float32),
                advantage=0.0 if index % 4 == 1 else float(draw.normal()),
            )
        )
    return samples


def make_trainer(
    model_dir: Path,
    world: World,
    *,
    budget: int = 64,
    grad_clip: float = 1e9,
    rate: float = 1e-3,
    compute_dtype: str = "float32",
    aggregate: str = "token-mean",
    skip_tied: bool = True,
    **settings: Any,
) -> PolicyTrainer:
    """settings: of `load_policy`."""
    train = TrainConfig(learning_rate=rate, warmup_steps=0, grad_clip=grad_clip, micro_batch_tokens=budget)
    policy = load_policy(model_dir, world, compute_dtype=compute_dtype, temperature=TEMPERATURE, **settings)
    return PolicyTrainer(policy, world, train, AlgorithmConfig(aggregate=aggregate, skip_tied=skip_tied))


def update(trainer: PolicyTrainer, *shares: list[Sample]) -> dict[str, float]:
    trainer.begin_update()
    for share in shares:
        trainer.accumulate(share)
    return trainer.end_update()


def first_gradient(trainer: PolicyTrainer | Critic) -> dict[str, np.ndarray]:
    """The gradient of the first update, as the optimizer took it: its first moment starts at (1 - beta1) times that."""
    moments = trainer.optimizer.state_dict()
    suffix = ".exp_avg"
    return {
        name.removesuffix(suffix): moment.full_tensor().cpu().numpy() / 0.1
        for name, moment in moments.items()
        if name.endswith(suffix)
    }


def reference(model_dir: Path, samples: list[Sample], mode: str) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and gradient of the whole batch by a padded forward pass in float64."""
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, **plain).eval()
    loss = padded_loss(lm, samples, mode)
    loss.backward()
    return loss.item(), {name: parameter.grad.numpy() for name, parameter in lm.named_parameters()}


def padded_loss(lm: torch.nn.Module, samples: list[Sample], mode: str) -> torch.Tensor:
    """The clipped loss, written out."""
    logprob_BT, _, mask_BT, old_BT = padded_scores(lm, samples)
    advantage_B1 = torch.tensor([[sample.advantage] for sample in samples], dtype=torch.float64)
    ratio_BT = (logprob_BT - old_BT).exp()
    loss_BT = torch.maximum(-advantage_B1 * ratio_BT, -advantage_B1 * ratio_BT.clamp(0.8, 1.28))
    loss_BT = torch.where(advantage_B1 < 0, torch.minimum(loss_BT, -3.0 * advantage_B1), loss_BT) * mask_BT
    length_B = mask_BT.sum(1)
    num_rows = (length_B > 0).sum()
    losses = {
        "token-mean": loss_BT.sum() / mask_BT.sum(),
        "token-sum": loss_BT.sum(),
        "seq-mean-token-sum": loss_BT.sum() / num_rows,
        "seq-mean-token-mean": (loss_BT.sum(1) / length_B.clamp(min=1)).sum() / num_rows,
    }
    return losses[mode]


class Padded(NamedTuple):
    """(B, T) each, in float64: responses of rows padded on the right. behave: the rollout's log-probs."""

    logprob_BT: torch.Tensor
    entropy_BT: torch.Tensor
    mask_BT: torch.Tensor
    behave_BT: torch.Tensor


def padded_scores(lm: torch.nn.Module, samples: list[Sample]) -> Padded:
    num_columns = max(len(sample.response_tokens) for sample in samples)
    token_BL, seen_BL = padded_tokens(samples)
    mask_BT, behave_BT = (torch.zeros(len(samples), num_columns, dtype=torch.float64) for _ in range(2))
    for row, sample in enumerate(samples):
        mask_BT[row, : len(sample.response_mask)] = torch.from_numpy(sample.response_mask)
        behave_BT[row, : len(sample.rollout_logprobs)] = torch.from_numpy(sample.rollout_logprobs)
    every_BLV = (lm(token_BL, attention_mask=seen_BL).logits / TEMPERATURE).log_softmax(-1)
    entropy_BL = -(every_BLV.exp() * every_BLV).sum(-1)
    logprobs, entropies = [], []
    for row, sample in enumerate(samples):
        num_prompt, num_response = len(sample.prompt_tokens), len(sample.response_tokens)
        places = torch.arange(num_prompt - 1, num_prompt + num_response - 1)
        targets = token_BL[row, num_prompt : num_prompt + num_response]
        logprobs.append(F.pad(every_BLV[row, places, targets], (0, num_columns - num_response)))
        entropies.append(F.pad(entropy_BL[row, places], (0, num_columns - num_response)))
    return Padded(torch.stack(logprobs), torch.stack(entropies), mask_BT, behave_BT)


def padded_tokens(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens, attention mask), each (B, L), of rows padded on the right."""
    length = max(len(sample.prompt_tokens) + len(sample.response_tokens) for sample in samples)
    token_BL = torch.zeros(len(samples), length, dtype=torch.int64)
    seen_BL = torch.zeros_like(token_BL)
    for row, sample in enumerate(samples):
        tokens = np.concatenate([sample.prompt_tokens, sample.response_tokens])
        token_BL[row, : len(tokens)] = torch.from_numpy(tokens)
        seen_BL[row, : len(tokens)] = 1
    return token_BL, seen_BL


def make_returns(samples: list[Sample], seed: int = 1) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """(returns, values before the update), one number a response token; some values are clipped."""
    draw = np.random.default_rng(seed)
    returns, old_values = (
        [draw.normal(size=len(sample.response_tokens)).astype(np.float32) for sample in samples] for _ in range(2)
    )
    return returns, old_values


def distance(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """‖found - expected‖ / ‖expected‖ over all tensors together."""
    assert set(found) == set(expected)
    difference = sum(float(np.square(found[name] - expected[name]).sum()) for name in expected)
    return (difference / sum(float(np.square(value).sum()) for value in expected.values())) ** 0.5
