"""Losses, KL and masks against those of TRL's GRPO trainer, where TRL is installed (`make test-cross-check`).

What runs is TRL's own loss, given log-probs instead of a model.
"""

from __future__ import annotations

import importlib
import os
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.algorithms import corrections, kl
from flowrl.algorithms.advantages import spread
from flowrl.algorithms.losses import aggregate, cispo, gspo, ppo, sapo

pytestmark = pytest.mark.filterwarnings("ignore")
if os.environ.get("FLOWRL_REQUIRE_TRL"):
    grpo_trainer = importlib.import_module("trl.trainer.grpo_trainer")
else:
    grpo_trainer = pytest.importorskip(
        "trl.trainer.grpo_trainer", reason="TRL is not installed (make test-cross-check)"
    )

B, T, HORIZON = 6, 9, 16


@pytest.fixture
def case() -> dict[str, Tensor]:
    torch.manual_seed(0)
    x_BT = -torch.rand(B, T) * 2
    mask_BT = (torch.arange(T)[None] < torch.tensor([[9], [5], [1], [7], [9], [3]])).float()
    return {
        "x": x_BT,
        "old": x_BT + 0.4 * torch.randn(B, T),
        "reference": x_BT + 0.4 * torch.randn(B, T),
        "adv": torch.randn(B),
        "mask": mask_BT,
    }


def theirs(case: dict[str, Tensor], loss_type: str, **given: Any) -> tuple[float, Tensor]:
    """Loss and its gradient in the log-probs."""
    settings = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "use_vllm": False,
        "_entropy_bonus_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": HORIZON,
    } | given
    arguments = SimpleNamespace(
        delta=None, use_bias_correction_kl=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        steps_per_generation=1,
    )  # fmt: skip
    x_BT = case["x"].clone().requires_grad_()
    trainer = SimpleNamespace(
        **settings,
        loss_type=loss_type,
        args=arguments,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            reduce=lambda x, reduction: x, gather=lambda x: x, num_processes=1, sync_gradients=True
        ),
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (x_BT, torch.zeros(B, T), None),
        get_off_policy_mask=grpo_trainer.GRPOTrainer.get_off_policy_mask,
    )
    ids_BT = torch.zeros(B, T, dtype=torch.int64)
    loss = grpo_trainer.GRPOTrainer._compute_loss(
        trainer,
        None,
        {
            "prompt_ids": ids_BT, "prompt_mask": ids_BT, "completion_ids": ids_BT, "completion_mask": case["mask"],
            "advantages": case["adv"], "old_per_token_logps": case["old"], "ref_per_token_logps": case["reference"],
            "num_items_in_batch": case["mask"].sum(),
        },
    )  # fmt: skip
    loss.backward()
    assert x_BT.grad is not None
    return loss.item(), x_BT.grad


def check(ours: Tensor, x_BT: Tensor, expected: tuple[float, Tensor]) -> None:
    ours.backward()
    assert ours.item() == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert x_BT.grad is not None
    torch.testing.assert_close(x_BT.grad, expected[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        ("grpo", "seq-mean-token-mean"),
        ("bnpo", "token-mean"),
        ("dapo", "token-mean"),
        ("dr_grpo", "seq-mean-token-sum-norm"),
    ],
)
def test_clipped_loss_and_its_aggregations(loss_type: str, mode: str, case: dict[str, Tensor]) -> None:
    x_BT = case["x"].clone().requires_grad_()
    adv_BT = spread(case["adv"], case["mask"])
    loss_BT, _ = ppo(x_BT, case["old"], adv_BT, case["mask"], lo=0.2, hi=0.28, c=None)
    check(aggregate(loss_BT, case["mask"], mode, horizon=HORIZON), x_BT, theirs(case, loss_type))


def test_sequence_ratio_of_gspo(case: dict[str, Tensor]) -> None:
    x_BT = case["x"].clone().requires_grad_()
    loss_BT, _ = gspo(x_BT, case["old"], spread(case["adv"], case["mask"]), case["mask"], lo=0.05, hi=0.08)
    given = {"importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.08}
    check(aggregate(loss_BT, case["mask"], "seq-mean-token-mean"), x_BT, theirs(case, "grpo", **given))


def test_weight_of_cispo(case: dict[str, Tensor]) -> None:
    """Its bound there is of the ratio itself, and there is no lower one."""
    x_BT = case["x"].clone().requires_grad_()
    loss_BT, _ = cispo(x_BT, case["old"], spread(case["adv"], case["mask"]), case["mask"], lo=None, hi=0.28)
    check(aggregate(loss_BT, case["mask"]), x_BT, theirs(case, "cispo", epsilon_high=1.28))


def test_soft_gate_of_sapo(case: dict[str, Tensor]) -> None:
    x_BT = case["x"].clone().requires_grad_()
    loss_BT, _ = sapo(x_BT, case["old"], spread(case["adv"], case["mask"]), case["mask"])
    check(aggregate(loss_BT, case["mask"], "seq-mean-token-mean"), x_BT, theirs(case, "sapo"))


def test_kl_in_the_loss(case: dict[str, Tensor]) -> None:
    x_BT = case["x"].clone().requires_grad_()
    loss_BT, _ = ppo(x_BT, case["old"], spread(case["adv"], case["mask"]), case["mask"], hi=0.28, c=None)
    loss_BT = loss_BT + kl.kl_loss(x_BT, case["reference"], case["mask"], 0.3, "k3")
    check(aggregate(loss_BT, case["mask"]), x_BT, theirs(case, "bnpo", beta=0.3))


def test_off_policy_sequence_mask(case: dict[str, Tensor]) -> None:
    x_BT = case["x"].clone().requires_grad_()
    adv_BT = spread(case["adv"], case["mask"])
    loss_BT, _ = ppo(x_BT, case["old"], adv_BT, case["mask"], hi=0.28, c=None)
    keep_BT = corrections.opsm(x_BT, case["old"], adv_BT, case["mask"], delta=0.05)
    assert 0 < keep_BT[:, 0].sum() < B
    check(aggregate(loss_BT * keep_BT, case["mask"]), x_BT, theirs(case, "bnpo", off_policy_mask_threshold=0.05))
