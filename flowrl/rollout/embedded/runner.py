"""One forward of the model over a step: packs tokens, calls it, returns the logits that are wanted.

Owns the two caches: decoding slots, dense, and the prompts under way. Knows nothing of sampling or of requests' fates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from flowrl.rollout.embedded.attention import DecodeSpan, PaddedChunks, Step, Visibility
from flowrl.rollout.embedded.dense import DenseForward, is_dense
from flowrl.rollout.embedded.kv_cache import KVCache
from flowrl.rollout.embedded.waiting import Chunk

Array = np.ndarray
Forward = Callable[[Tensor, Tensor, Step], Tensor]

# Reading how many keys more costs about as much as one more call of attention: on a CPU, on anything else.
_CALL_KEYS_CPU, _CALL_KEYS = 1 << 10, 1 << 18


class Runner:
    def __init__(self, model: PreTrainedModel, max_slots: int, max_model_tokens: int, prefill_tokens: int) -> None:
        """`prefill_tokens`: prompt tokens a step at most. A step begins no more prompts than there are free slots."""
        self._forward: Forward = DenseForward(model) if is_dense(model) else partial(_call, model)
        self._device = model.device
        self._call_keys = _CALL_KEYS_CPU if model.device.type == "cpu" else _CALL_KEYS
        self._decode_kv = KVCache(max_slots, max_model_tokens)
        self._prefill_kv = KVCache(min(prefill_tokens, max_slots) + 1, max_model_tokens)

    def forward(self, last_tokens_N: Array, positions_N: Array, chunks: list[Chunk]) -> Tensor:
        """Logits (N + admitted, V): of every decoding slot, then of each chunk's last token as often as it admits
        members. The admitted get the next slots of the decode cache, with their prompts' KV."""
        n = len(positions_N)
        step = self._step(positions_N, chunks)
        tokens = _concatenate([last_tokens_N, *(chunk.group.tokens[chunk.start : chunk.end] for chunk in chunks)])
        ends = n + np.cumsum([chunk.end - chunk.start for chunk in chunks], dtype=np.int64)
        admitted = np.array([chunk.num_admitted for chunk in chunks], dtype=np.int64)
        wanted = _concatenate([np.arange(n), ends[admitted > 0] - 1])
        logits = self._forward(self._tensor(tokens), self._tensor(wanted), step)
        self._admit([chunk for chunk in chunks if chunk.num_admitted], n)
        if (admitted <= 1).all():
            return logits
        copies = np.concatenate([np.ones(n, dtype=np.int64), admitted[admitted > 0]])
        return logits.repeat_interleave(self._tensor(copies), dim=0)

    def move(self, source: Array, target: Array, tokens: int) -> None:
        """Row source[i] of the decode cache, of up to `tokens` tokens, becomes row target[i]."""
        self._decode_kv.copy(self._decode_kv, self._tensor(source), self._tensor(target), tokens)

    def release(self) -> None:
        """Frees both caches; they are made anew as they are used. No request may have KV in them."""
        self._decode_kv.release()
        self._prefill_kv.release()

    def _step(self, positions_N: Array, chunks: list[Chunk]) -> Step:
        n = len(positions_N)
        self._decode_kv.reserve(n, int(positions_N.max(initial=-1)) + 1)
        if chunks:
            self._prefill_kv.reserve(max(one.group.slot for one in chunks) + 1, max(one.end for one in chunks))
        lengths = [chunk.end - chunk.start for chunk in chunks]
        starts = n + np.cumsum([0, *lengths])
        buckets = _buckets([(chunk.end - chunk.start, chunk.end) for chunk in chunks])
        slots = [np.full(length, chunk.group.slot) for length, chunk in zip(lengths, chunks, strict=True)]
        positions = self._tensor(_concatenate([positions_N, *(np.arange(one.start, one.end) for one in chunks)]))
        return Step(
            decode_kv=self._decode_kv,
            prefill_kv=self._prefill_kv,
            num_decode=n,
            slots_T=self._tensor(_concatenate([np.arange(n), *slots])),
            positions_T=positions,
            spans=tuple(
                DecodeSpan(start, stop, Visibility(positions[start:stop, None], context))
                for start, stop, context in spans(positions_N, self._call_keys)
            ),
            chunks=tuple(self._pad([chunks[i] for i in bucket], starts[bucket]) for bucket in buckets),
        )

    def _pad(self, chunks: list[Chunk], starts_P: Array) -> PaddedChunks:
        length_P = np.array([chunk.end - chunk.start for chunk in chunks])
        offset_PQ = np.minimum(np.arange(length_P.max()), length_P[:, None] - 1)
        is_real_PQ = np.arange(length_P.max()) < length_P[:, None]
        tokens_PQ = starts_P[:, None] + offset_PQ
        first_P = np.array([chunk.start for chunk in chunks])
        positions_PQ = self._tensor(first_P[:, None] + offset_PQ)
        return PaddedChunks(
            slots_P=self._tensor(np.array([chunk.group.slot for chunk in chunks])),
            tokens_PQ=self._tensor(tokens_PQ),
            source_R=self._tensor(np.flatnonzero(is_real_PQ)),
            target_R=self._tensor(tokens_PQ[is_real_PQ]),
            visibility=Visibility(positions_PQ, max(chunk.end for chunk in chunks)),
        )

    def _admit(self, chunks: list[Chunk], first_slot: int) -> None:
        """Copies each admitted member's prompt from the prefill cache, prompts of like length at once."""
        admitted = np.array([chunk.num_admitted for chunk in chunks], dtype=np.int64)
        if not chunks:
            return
        ends = first_slot + np.cumsum(admitted)
        self._decode_kv.reserve(int(ends[-1]), max(chunk.end for chunk in chunks))
        for bucket in _buckets([(chunk.end,) for chunk in chunks]):
            sources = np.repeat([chunks[i].group.slot for i in bucket], admitted[bucket])
            targets = np.concatenate([np.arange(ends[i] - admitted[i], ends[i]) for i in bucket])
            tokens = max(chunks[i].end for i in bucket)
            self._decode_kv.copy(self._prefill_kv, self._tensor(sources), self._tensor(targets), tokens)

    def _tensor(self, values: Array) -> Tensor:
        return torch.from_numpy(values).to(self._device)


def spans(positions: Array, call_keys: int, first: int = 0) -> list[tuple[int, int, int]]:
    """Cuts slots into neighbours of like length: (start, stop, longest context), where `positions` are those of the
    slots from `first` on. Each cut is one call more, and spares the reading of at least `call_keys` keys."""
    num = len(positions)
    if not num:
        return []
    longest = int(positions.max()) + 1
    whole = [(first, first + num, longest)]
    if num * longest - int(positions.sum()) - num < call_keys:
        return whole
    before = np.maximum.accumulate(positions)[:-1] + 1
    after = np.maximum.accumulate(positions[::-1])[::-1][1:] + 1
    left = np.arange(1, num)
    read = left * before + (num - left) * after
    cut = int(read.argmin()) + 1
    if num * longest - int(read[cut - 1]) < call_keys:
        return whole
    return spans(positions[:cut], call_keys, first) + spans(positions[cut:], call_keys, first + cut)


def _call(model: PreTrainedModel, tokens_T: Tensor, wanted_W: Tensor, step: Step) -> Tensor:
    """Logits (W, V) by the model's own forward."""
    positions = step.positions_T[None]
    output = model(
        input_ids=tokens_T[None], position_ids=positions, use_cache=False, logits_to_keep=wanted_W, step=step
    )
    logits: Tensor = output.logits[0]
    return logits


def _concatenate(arrays: Iterable[Array]) -> Array:
    return np.concatenate([np.empty(0, dtype=np.int64), *arrays])


def _buckets(sizes: list[tuple[int, ...]]) -> list[list[int]]:
    """Indices of what may be padded together: every size within a factor of two."""
    buckets: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, one in enumerate(sizes):
        buckets[tuple(size.bit_length() for size in one)].append(index)
    return list(buckets.values())
