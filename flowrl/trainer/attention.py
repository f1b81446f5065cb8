"""Causal attention over packed rows, for any Hugging Face model: tokens of all rows in one sequence, no T x T mask.

Shapes: N packed tokens; S slots, rows padded to the length of their bucket; B rows of a bucket, L its length; H query
heads, K key heads, D their size.

Rows of similar length share a bucket. A bucket is attended to as a padded batch: padding stands at the end of its row,
so that under the causal rule no real token sees it. On a GPU in half precision the kernel for variable lengths runs
instead.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface

ATTENTION_NAME = "flowrl_packed"
# A row joins a bucket unless it wastes more than both of these of the bucket's length.
BUCKET_SLACK_TOKENS = 8
BUCKET_SLACK_SHARE = 0.25

# Earlier releases of the kernel cannot share key heads; there the buckets serve.
VARLEN_IS_COMPLETE = {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


@dataclass(frozen=True, slots=True)
class Bucket:
    """`num_rows * length` slots from `start` on."""

    start: int
    num_rows: int
    length: int


class PackedLayout:
    """Where the rows of one micro-batch lie, computed once and used by every layer.

    token_of_slot_S: the packed token in each slot, for padding any real one. slot_of_token_N: its inverse.
    """

    __slots__ = ("buckets", "cu_seqlens", "is_identity", "max_length", "slot_of_token_N", "token_of_slot_S")

    def __init__(self, length_B: np.ndarray, device: torch.device) -> None:
        cu_length = np.concatenate([[0], np.cumsum(length_B)])
        order = np.argsort(-length_B, kind="stable")
        slots: list[np.ndarray] = []
        self.buckets: list[Bucket] = []
        start = 0
        for rows in _similar(order, length_B):
            longest = int(length_B[rows[0]])
            offset = np.minimum(np.arange(longest)[None], length_B[rows][:, None] - 1)
            slots.append((cu_length[rows][:, None] + offset).reshape(-1))
            self.buckets.append(Bucket(start, len(rows), longest))
            start += len(rows) * longest
        token_of_slot = np.concatenate(slots)
        # Padding repeats a row's last token; written backwards, the first slot of a token is the one that remains.
        slot_of_token = np.empty(cu_length[-1], dtype=np.int64)
        slot_of_token[token_of_slot[::-1]] = np.arange(start)[::-1]
        self.is_identity = bool(start == cu_length[-1] and (slot_of_token == np.arange(start)).all())
        self.token_of_slot_S = torch.from_numpy(token_of_slot).to(device)
        self.slot_of_token_N = torch.from_numpy(slot_of_token).to(device)
        self.cu_seqlens = torch.from_numpy(cu_length.astype(np.int32)).to(device)
        self.max_length = int(length_B.max())


def _similar(order: np.ndarray, length_B: np.ndarray) -> list[np.ndarray]:
    """Cuts rows, longest first, wherever one is too short for the bucket it would be padded in."""
    cuts, longest = [], length_B[order[0]]
    for place, index in enumerate(order):
        if longest - length_B[index] > max(BUCKET_SLACK_TOKENS, BUCKET_SLACK_SHARE * longest):
            cuts.append(place)
            longest = length_B[index]
    return np.split(order, cuts)


class _ToSlots(torch.autograd.Function):
    """x_N -> x_S. Each token has one real slot, so the gradient is a gather too, and not a scatter-add: what reaches
    padding is zero, because no real token attends to it."""

    @staticmethod
    def forward(
        ctx: Any, x_N: torch.Tensor, token_of_slot_S: torch.Tensor, slot_of_token_N: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(slot_of_token_N)
        return x_N.index_select(0, token_of_slot_S)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (slot_of_token_N,) = ctx.saved_tensors
        return grad[0].index_select(0, slot_of_token_N), None, None


class _ToTokens(torch.autograd.Function):
    """x_S -> x_N, leaving padding behind."""

    @staticmethod
    def forward(ctx: Any, x_S: torch.Tensor, slot_of_token_N: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(slot_of_token_N)
        ctx.shape = x_S.shape
        return x_S.index_select(0, slot_of_token_N)

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (slot_of_token_N,) = ctx.saved_tensors
        return grad[0].new_zeros(ctx.shape).index_copy_(0, slot_of_token_N, grad[0]), None


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    layout: PackedLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """query: (1, H, N, D); key, value: (1, K, N, D). Returns (1, N, H, D).

    Raises ValueError for a model whose attention is not plainly causal.
    """
    if sliding_window is not None and layout.max_length > sliding_window:
        raise ValueError(f"sliding_window: {sliding_window}; full attention is needed for rows of {layout.max_length}")
    if dropout or kwargs.get("softcap") is not None:
        raise ValueError(f"attention: dropout={dropout}, softcap={kwargs.get('softcap')}; training supports neither")
    query_N, key_N, value_N = (x[0].transpose(0, 1) for x in (query, key, value))
    if VARLEN_IS_COMPLETE and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        bounds = (layout.cu_seqlens, layout.cu_seqlens, layout.max_length, layout.max_length)
        output_N = varlen_attn(query_N, key_N, value_N, *bounds, scale=scaling, window_size=(-1, 0), enable_gqa=True)
        assert isinstance(output_N, torch.Tensor)
        return output_N[None], None
    return _bucketed(query_N, key_N, value_N, layout, scaling)[None], None


def _bucketed(
    query_N: torch.Tensor, key_N: torch.Tensor, value_N: torch.Tensor, layout: PackedLayout, scaling: float | None
) -> torch.Tensor:
    slots = [query_N, key_N, value_N]
    if not layout.is_identity:
        slots = [_ToSlots.apply(x, layout.token_of_slot_S, layout.slot_of_token_N) for x in slots]
    outputs = []
    for bucket in layout.buckets:
        end = bucket.start + bucket.num_rows * bucket.length
        query, key, value = (
            x[bucket.start : end].unflatten(0, (bucket.num_rows, bucket.length)).transpose(1, 2) for x in slots
        )
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    output_S = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
    return output_S if layout.is_identity else _ToTokens.apply(output_S, layout.slot_of_token_N)


AttentionInterface.register(ATTENTION_NAME, packed_attention)
