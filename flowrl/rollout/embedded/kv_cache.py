"""Keys and values of running requests: one row ("slot") a request, dense along tokens.

A layer's tensors are made at its first write, in the shape that the architecture gives its heads, and grow by doubling
with the longest request: memory follows use. Owns memory only; which request has which slot is said elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_SMALLEST_CAPACITY = 32


class KVCache:
    """keys[layer]: (slots, kv_heads, capacity, head_dim); values[layer] likewise.

    What was never written is 0, not garbage: attention masks it, but a NaN would pass through a mask."""

    def __init__(self, max_slots: int, max_tokens: int) -> None:
        self._max_slots = max_slots
        self._max_tokens = max_tokens
        self._num_slots = 0
        self._capacity = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self._keys.values(), *self._values.values()))

    def reserve(self, slots: int, tokens: int) -> None:
        """Makes room for `slots` rows of `tokens`; what was written stays."""
        assert slots <= self._max_slots and tokens <= self._max_tokens, "reserved beyond the limits of the cache"
        if slots <= self._num_slots and tokens <= self._capacity:
            return
        self._num_slots = _grown(slots, self._num_slots, self._max_slots)
        self._capacity = _grown(max(tokens, _SMALLEST_CAPACITY), self._capacity, self._max_tokens)
        for tensors in (self._keys, self._values):
            for layer, old in tensors.items():
                tensors[layer] = self._allocate(old)
                tensors[layer][: old.shape[0], :, : old.shape[2]] = old

    def release(self) -> None:
        """Frees everything, as if nothing had been written."""
        self._num_slots = self._capacity = 0
        self._keys, self._values = {}, {}

    def write(self, layer: int, slots_T: Tensor, positions_T: Tensor, key_THD: Tensor, value_THD: Tensor) -> None:
        """Stores one token's key and value in each (slot, position). D may differ between keys and values."""
        for tensors, states_THD in ((self._keys, key_THD), (self._values, value_THD)):
            if layer not in tensors:
                tensors[layer] = self._allocate(states_THD[:, :, None])
            tensors[layer][slots_T, :, positions_T] = states_THD

    def slots(self, layer: int, start: int, stop: int, tokens: int) -> tuple[Tensor, Tensor]:
        """Views (stop - start, kv_heads, tokens, head_dim) of neighbouring rows: no copy."""
        return self._keys[layer][start:stop, :, :tokens], self._values[layer][start:stop, :, :tokens]

    def rows(self, layer: int, slots_P: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Copies (P, kv_heads, tokens, head_dim) of any rows."""
        return self._keys[layer][:, :, :tokens][slots_P], self._values[layer][:, :, :tokens][slots_P]

    def copy(self, source: KVCache, source_slots: Tensor, slots: Tensor, tokens: int) -> None:
        """Copies the first `tokens` of rows of `source` (which may be this cache) into rows of this one."""
        for mine, theirs in ((self._keys, source._keys), (self._values, source._values)):
            for layer, tensor in theirs.items():
                if layer not in mine:
                    mine[layer] = self._allocate(tensor)
                mine[layer][slots, :, :tokens] = tensor[:, :, :tokens][source_slots]

    def _allocate(self, like: Tensor) -> Tensor:
        """`like`: (any, kv_heads, any, head_dim)."""
        return torch.zeros(
            (self._num_slots, like.shape[1], self._capacity, like.shape[3]), dtype=like.dtype, device=like.device
        )


def _grown(needed: int, present: int, limit: int) -> int:
    return present if needed <= present else min(max(needed, 2 * present), limit)
