"""Floating-point operations of a model are those that torch counts while it trains."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from flowrl.stages.train import rates
from flowrl.trainer.flops import ModelFlops, peak_flops
from flowrl.trainer.model import Policy, load_lm
from flowrl.trainer.packing import pack_samples
from tests.trainer.cases import make_samples
from tests.trainer.ladder import Ladder

CPU = torch.device("cpu")
SAMPLES = [sample for sample in make_samples(6) if sample.num_trained_tokens]


@pytest.mark.parametrize("name", ["qwen3", "gpt2"])
def test_operations_of_matrices_are_those_that_torch_counts(name: str, ladder: Ladder) -> None:
    lm = load_lm(ladder.models / name)
    packed = pack_samples(SAMPLES, CPU).packed
    with FlopCounterMode(display=False) as counter:
        Policy(lm, 1.0)(packed)[0].sum().backward()
    counted = sum(count for op, count in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    flops = ModelFlops.of(lm)
    # The head is computed once more in the backward pass, but torch does not count products that are added in place.
    expected = 3 * flops.token * packed.token_1N.numel() + 3 * flops.target * len(packed.target_R)
    assert counted == pytest.approx(expected, rel=1e-6)


def test_token_of_a_mixture_visits_a_few_of_its_experts(ladder: Ladder) -> None:
    lm = load_lm(ladder.models / "qwen3_moe")
    config, num_layers = lm.config, len(lm.model.layers)
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    router = config.hidden_size * config.num_experts
    attention = config.hidden_size * config.head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    assert ModelFlops.of(lm).token == 2 * num_layers * (config.num_experts_per_tok * expert + router + attention)


def test_attention_is_counted_by_what_a_token_may_see() -> None:
    assert ModelFlops(token=0, pair=1, target=0).training([3, 1], 4) == 3 * (6 + 1)


def test_use_of_a_device_is_told_where_its_peak_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = {"timing_s/update_actor": 2.0}
    assert peak_flops(CPU) is None
    assert rates(4e12, measured, CPU) == {"perf/tflops/actor": 2.0}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    card: torch.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    assert rates(989e12, measured, card) == {"perf/tflops/actor": 494.5, "perf/mfu/actor": 0.5}
