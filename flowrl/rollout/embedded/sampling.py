"""From logits to tokens, for a whole batch at once. Pure: randomness comes in as one uniform number a row.

A row's uniform is a hash of (the request's seed, the index of the token in the response), so that a seeded request
draws the same numbers whatever else is in the batch. Tokens are drawn by inverting the cumulative distribution.

Shapes: N rows, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK_64 = (1 << 64) - 1
# So few bits that `uniform * total` is below `total` in float32: the inversion never runs off the end.
_UNIFORM_BITS = 23


@dataclass(frozen=True)
class SamplingColumns:
    """Sampling parameters by row, all of shape (N,). float32: temperature, top_p, min_p; int64: top_k (0 is off)."""

    temperature: Array
    top_p: Array
    top_k: Array
    min_p: Array


def splitmix64(state: Array) -> Array:
    """Steele, Lea and Flood 2014: one output of the splitmix64 generator for each uint64 state."""
    z = state + _GOLDEN
    z = (z ^ (z >> np.uint64(30))) * _MIX_1
    z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def stream_keys(seeds: list[int]) -> Array:
    """uint64 keys of the random streams of `seeds` (any integers)."""
    return splitmix64(np.array([seed & _MASK_64 for seed in seeds], dtype=np.uint64))


def uniforms(keys_N: Array, counters_N: Array) -> Array:
    """float32 in [0, 1): number `counter` of the stream `key`."""
    bits = splitmix64(keys_N ^ splitmix64(counters_N.astype(np.uint64)))
    return (bits >> np.uint64(64 - _UNIFORM_BITS)).astype(np.float32) * np.float32(2.0**-_UNIFORM_BITS)


def penalise(logits_NV: Tensor, penalty_N: Array, tokens_NT: Array, counts_N: Array) -> Tensor:
    """Logits after the repetition penalty. Row n's response has the tokens `tokens_NT[n, : counts_N[n]]` so far."""
    rows = np.flatnonzero((penalty_N != 1) & (counts_N > 0))
    if not len(rows):
        return logits_NV
    seen_RT = tokens_NT[rows, : counts_N[rows].max()].astype(np.int64)
    is_there_RT = np.arange(seen_RT.shape[1]) < counts_N[rows, None]
    index_RT = torch.from_numpy(np.where(is_there_RT, seen_RT, seen_RT[:, :1])).to(logits_NV.device)
    rows_R = torch.from_numpy(rows).to(logits_NV.device)
    penalty_R1 = torch.from_numpy(penalty_N[rows, None]).to(logits_NV.device)
    logits_NV = logits_NV.float().clone()
    old_RT = logits_NV[rows_R[:, None], index_RT]
    logits_NV[rows_R[:, None], index_RT] = torch.where(old_RT < 0, old_RT * penalty_R1, old_RT / penalty_R1)
    return logits_NV


def sample(logits_NV: Tensor, columns: SamplingColumns, uniforms_N: Array) -> tuple[Array, Array]:
    """(tokens int64 (N,), logprobs float32 (N,)). Log-probs are at the sampling temperature (1 where it is 0) and
    before the filters."""
    device = logits_NV.device
    logits_NV = logits_NV.float()
    is_greedy = columns.temperature == 0
    scale = np.where(is_greedy, np.float32(1), columns.temperature)
    if (scale != 1).any():
        logits_NV = logits_NV / torch.from_numpy(scale).to(device)[:, None]
    logprobs_NV = torch.log_softmax(logits_NV, dim=-1)
    if is_greedy.all():
        tokens_N1 = logprobs_NV.argmax(dim=-1, keepdim=True)
    else:
        tokens_N1 = _draw(logprobs_NV, columns, torch.from_numpy(uniforms_N).to(device))
        if is_greedy.any():
            best_N1 = logprobs_NV.argmax(dim=-1, keepdim=True)
            tokens_N1 = torch.where(torch.from_numpy(is_greedy).to(device)[:, None], best_N1, tokens_N1)
    chosen_N1 = logprobs_NV.gather(1, tokens_N1)
    return tokens_N1[:, 0].cpu().numpy(), chosen_N1[:, 0].cpu().numpy()


def _draw(logprobs_NV: Tensor, columns: SamplingColumns, uniforms_N: Tensor) -> Tensor:
    """Tokens (N, 1) by inversion. A token of probability 0 is never drawn: its step in the cumulative sum is empty."""
    probs_NV = logprobs_NV.exp()
    is_filtered = (columns.top_p < 1) | (columns.top_k > 0) | (columns.min_p > 0)
    if is_filtered.any():
        rows = np.flatnonzero(is_filtered)
        index = torch.from_numpy(rows).to(probs_NV.device)
        probs_NV[index] = _filter(probs_NV[index], columns, rows)
    cumulative_NV = probs_NV.cumsum(dim=-1)
    target_N1 = uniforms_N[:, None] * cumulative_NV[:, -1:]
    return torch.searchsorted(cumulative_NV, target_N1, right=True)


def _filter(probs_NV: Tensor, columns: SamplingColumns, rows: Array) -> Tensor:
    """Sets to 0 what top-k, top-p or min-p cut off, each judged on the whole distribution. The best token stays."""

    def column(values: Array) -> Tensor:
        return torch.from_numpy(values[rows]).to(probs_NV.device)[:, None]

    sorted_NV, order_NV = probs_NV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_NV.shape[1], device=probs_NV.device)
    top_k = column(columns.top_k)
    mass_before_NV = sorted_NV.cumsum(dim=-1) - sorted_NV
    is_kept = (rank_V < top_k) | (top_k == 0)
    is_kept &= (mass_before_NV < column(columns.top_p)) & (sorted_NV >= column(columns.min_p) * sorted_NV[:, :1])
    is_kept[:, 0] = True
    return torch.zeros_like(probs_NV).scatter_(1, order_NV, sorted_NV * is_kept)
