"""Packing loses no token and mixes no rows; packed attention equals the padded forward pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from flowrl.trainer.attention import ATTENTION_NAME, PackedLayout, packed_attention
from flowrl.trainer.model import Policy
from flowrl.trainer.packing import pack_samples, samples_from_rows, split_by_tokens
from tests.trainer.cases import TEMPERATURE, VOCABULARY, make_samples, padded_scores
from transfer_queue.rows import Column, RowKey, Rows

CPU = torch.device("cpu")
LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=40)


@given(LENGTHS, st.integers(1, 100))
def test_every_row_is_in_one_micro_batch_within_the_budget(lengths: list[int], budget: int) -> None:
    parts = split_by_tokens(lengths, budget)
    assert sorted(index for part in parts for index in part) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in part) <= budget or len(part) == 1 for part in parts)


@settings(deadline=None)
@given(LENGTHS)
def test_every_token_has_a_slot_and_every_slot_a_token_of_its_row(lengths: list[int]) -> None:
    layout = PackedLayout(np.array(lengths), CPU)
    num_tokens = sum(lengths)
    assert torch.equal(layout.token_of_slot_S[layout.slot_of_token_N], torch.arange(num_tokens))
    row_of_token = np.repeat(np.arange(len(lengths)), lengths)
    row_of_slot = row_of_token[layout.token_of_slot_S.numpy()]
    for bucket in layout.buckets:
        end = bucket.start + bucket.num_rows * bucket.length
        rows = row_of_slot[bucket.start : end].reshape(bucket.num_rows, bucket.length)
        assert (rows == rows[:, :1]).all()


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 99))
def test_attention_over_buckets_equals_attention_row_by_row(lengths: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    query, key, value = (torch.randn(1, heads, sum(lengths), 8, dtype=torch.float64) for heads in (4, 2, 2))
    leaves = [x.requires_grad_() for x in (query, key, value)]
    layout = PackedLayout(np.array(lengths), CPU)
    packed, _ = packed_attention(torch.nn.Identity(), *leaves, None, layout=layout, scaling=0.3)
    rows = [
        torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, scale=0.3, enable_gqa=True)
        for parts in zip(*(x.split(lengths, dim=2) for x in leaves), strict=True)
    ]
    expected = torch.cat(rows, dim=2).transpose(1, 2)
    torch.testing.assert_close(packed, expected)
    upstream = torch.randn_like(packed)
    found = torch.autograd.grad((packed * upstream).sum(), leaves)
    for gradient, exact in zip(found, torch.autograd.grad((expected * upstream).sum(), leaves), strict=True):
        torch.testing.assert_close(gradient, exact)


def test_packed_logprobs_equal_those_of_a_padded_forward(model_dir: Path) -> None:
    samples = [sample for sample in make_samples(16, longest=50) if sample.num_trained_tokens]
    lm = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation=ATTENTION_NAME).eval()
    micro_batch = pack_samples(samples, CPU)
    with torch.no_grad():
        logprob_R, _ = Policy(lm, TEMPERATURE)(micro_batch.packed)
        exact = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64, attn_implementation="eager").eval()
        exact_BT, _, mask_BT, old_BT = padded_scores(exact, samples)
    is_trained = mask_BT > 0
    torch.testing.assert_close(logprob_R.double(), exact_BT[is_trained], rtol=0, atol=1e-5)
    torch.testing.assert_close(micro_batch.rollout_logprob_R.double(), old_BT[is_trained])


@pytest.mark.parametrize(
    ("config_class", "model_class"), [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)]
)
def test_other_families_take_packed_attention(config_class: Any, model_class: Any) -> None:
    torch.manual_seed(0)
    config = config_class(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    lm = model_class(config).eval()
    samples = [sample for sample in make_samples(6) if sample.num_trained_tokens]
    with torch.no_grad():
        exact_BT, _, mask_BT, _ = padded_scores(lm, samples)
        lm.set_attn_implementation(ATTENTION_NAME)
        logprob_R, _ = Policy(lm, TEMPERATURE)(pack_samples(samples, CPU).packed)
    torch.testing.assert_close(logprob_R, exact_BT[mask_BT > 0].float(), rtol=0, atol=1e-5)


def test_table_puts_trained_tokens_flush_left() -> None:
    samples = make_samples(6)
    packed = pack_samples(samples, CPU).packed
    counts = [sample.num_trained_tokens for sample in samples]
    assert packed.mask_BT().sum(1).tolist() == counts
    targets = packed.table(packed.target_R)
    for row, sample in enumerate(samples):
        expected = sample.response_tokens[sample.response_mask.astype(bool)]
        assert targets[row, : counts[row]].tolist() == expected.tolist()


def make_rows(num_logprobs: int, num_prompt: int = 2) -> Rows:
    columns = {
        "prompt_tokens": Column.ragged([range(num_prompt)], "int32"),
        "response_tokens": Column.ragged([[5, 6, 7]], "int32"),
        "response_mask": Column.ragged([[1, 1, 1]], "uint8"),
        "rollout_logprobs": Column.ragged([[-1.0] * num_logprobs], "float32"),
        "advantage": Column.scalars([0.5], "float32"),
    }
    return Rows([RowKey("train", 4, 2)], columns)


def test_rows_of_the_queue_become_samples() -> None:
    (sample,) = samples_from_rows(make_rows(3))
    assert sample.key == RowKey("train", 4, 2) and sample.advantage == 0.5
    assert sample.response_tokens.tolist() == [5, 6, 7] and sample.num_trained_tokens == 3


@pytest.mark.parametrize(("rows", "message"), [(make_rows(2), "rollout|log-probs"), (make_rows(3, 0), "prompt_tokens")])
def test_row_that_does_not_fit_itself_is_refused_by_name(rows: Rows, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        samples_from_rows(rows)
    assert "group=4" in str(caught.value)


def test_sliding_window_shorter_than_a_row_is_refused() -> None:
    query = torch.randn(1, 2, 9, 4)
    with pytest.raises(ValueError, match="sliding_window: 8"):
        layout = PackedLayout(np.array([9]), CPU)
        packed_attention(torch.nn.Identity(), query, query, query, None, layout=layout, sliding_window=8)
