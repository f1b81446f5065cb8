"""Attention over slots, registered with transformers: every architecture that uses its attention interface works.

A step is one packed row of tokens: first one token for each decoding slot, then chunks of prompts. The model computes
on the packed row; this function alone knows which token belongs to whom. Keys and values go into the caches here, so
the model is called without a cache of its own.

Shapes: T packed tokens, N slots of a span, P chunks, Q padded chunk length, L context, H heads, K key-value heads,
G = H / K, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from flowrl.rollout.embedded.kv_cache import KVCache

SLOT_ATTENTION = "flowrl_slots"
# Options that change the result and that this function does not compute.
_UNSUPPORTED_OPTIONS = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class Visibility:
    """Which keys each query of a batch sees: those up to its own position, of `context` keys. Masks are made once a
    step, one for each sliding window that the model's layers use."""

    positions_BQ: Tensor
    context: int
    _masks: dict[int | None, Tensor] = field(default_factory=dict)

    def mask(self, window: int | None) -> Tensor:
        """bool (B, 1, Q, L)."""
        if window not in self._masks:
            positions_BQ1 = self.positions_BQ[..., None]
            keys_L = torch.arange(self.context, device=positions_BQ1.device)
            visible = keys_L <= positions_BQ1
            if window is not None:
                visible &= keys_L > positions_BQ1 - window
            self._masks[window] = visible[:, None]
        return self._masks[window]


@dataclass(frozen=True)
class DecodeSpan:
    """Neighbouring slots [start, stop) of like length, which read no further than the longest of them."""

    start: int
    stop: int
    visibility: Visibility


@dataclass(frozen=True)
class PaddedChunks:
    """Chunks of prompts of like size. slots_P: rows of the prefill cache. tokens_PQ: index in the packed row; padding
    repeats the chunk's last token and its position. source_R, target_R: of the R real tokens, the place in the
    flattened (P, Q) and in the packed row."""

    slots_P: Tensor
    tokens_PQ: Tensor
    source_R: Tensor
    target_R: Tensor
    visibility: Visibility


@dataclass(frozen=True)
class Step:
    """One forward: whose tokens are packed where. slots_T, positions_T: where each token's KV goes, the first
    `num_decode` into the decode cache, the others into the prefill cache."""

    decode_kv: KVCache
    prefill_kv: KVCache
    num_decode: int
    slots_T: Tensor
    positions_T: Tensor
    spans: tuple[DecodeSpan, ...]
    chunks: tuple[PaddedChunks, ...]


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    step: Step,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D)."""
    for option in _UNSUPPORTED_OPTIONS:
        if options.get(option) is not None:
            raise ValueError(f"model: its attention uses {option!r}, which the embedded engine does not compute")
    layer: int = module.layer_idx  # type: ignore[assignment]
    query_THD, key_TKD, value_TKD = (states[0].transpose(0, 1) for states in (query, key, value))
    return attend(layer, query_THD, key_TKD, value_TKD, step, scaling, sliding_window)[None], None


def attend(
    layer: int,
    query_THD: Tensor,
    key_TKD: Tensor,
    value_TKD: Tensor,
    step: Step,
    scaling: float | None = None,
    window: int | None = None,
) -> Tensor:
    """(T, H, D): writes the step's keys and values into the caches and attends to what each token sees there."""
    n = step.num_decode
    output_THD = query_THD.new_empty((*query_THD.shape[:2], value_TKD.shape[2]))
    if n:
        step.decode_kv.write(layer, step.slots_T[:n], step.positions_T[:n], key_TKD[:n], value_TKD[:n])
    for span in step.spans:
        output_THD[span.start : span.stop] = _decode(layer, query_THD, step.decode_kv, span, scaling, window)
    if step.chunks:
        step.prefill_kv.write(layer, step.slots_T[n:], step.positions_T[n:], key_TKD[n:], value_TKD[n:])
    for chunks in step.chunks:
        output_RHD = _prefill(layer, query_THD, step.prefill_kv, chunks, scaling, window)
        output_THD[chunks.target_R] = output_RHD
    return output_THD


def _decode(
    layer: int, query_THD: Tensor, cache: KVCache, span: DecodeSpan, scaling: float | None, window: int | None
) -> Tensor:
    """(N, H, D). The G query heads of a key-value head are its queries: no key is repeated."""
    keys, values = cache.slots(layer, span.start, span.stop, span.visibility.context)
    query_NHD = query_THD[span.start : span.stop]
    query_NKGD = query_NHD.reshape(len(query_NHD), keys.shape[1], -1, keys.shape[3])
    mask = span.visibility.mask(window)
    output_NKGD = scaled_dot_product_attention(query_NKGD, keys, values, attn_mask=mask, scale=scaling)
    return output_NKGD.flatten(1, 2)


def _prefill(
    layer: int, query_THD: Tensor, cache: KVCache, chunks: PaddedChunks, scaling: float | None, window: int | None
) -> Tensor:
    """(R, H, D): of the chunks' real tokens, in the order of `chunks.target_R`."""
    keys, values = cache.rows(layer, chunks.slots_P, chunks.visibility.context)
    num_chunks, length = chunks.tokens_PQ.shape
    kv_heads = keys.shape[1]
    query_PQKGD = query_THD[chunks.tokens_PQ].unflatten(2, (kv_heads, -1))
    groups = query_PQKGD.shape[3]
    query_PKXD = query_PQKGD.permute(0, 2, 3, 1, 4).reshape(num_chunks, kv_heads, groups * length, -1)
    mask = chunks.visibility.mask(window).repeat(1, 1, groups, 1)
    output_PKXD = scaled_dot_product_attention(query_PKXD, keys, values, attn_mask=mask, scale=scaling)
    output_PQHD = output_PKXD.unflatten(2, (groups, length)).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return output_PQHD.flatten(0, 1)[chunks.source_R]


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
