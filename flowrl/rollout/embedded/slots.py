"""The decoding requests, as columns over slots. Slots 0 to `num_active` - 1 are in use, without holes.

Row i here is row i of the decode cache. When requests leave, the last rows move into the holes; `remove` says which, so
that the cache moves the same rows.
"""

from __future__ import annotations

import numpy as np

from flowrl.rollout.embedded.sampling import SamplingColumns
from flowrl.rollout.embedded.waiting import Sequence

Array = np.ndarray

_NO_TOKEN = -1


class SlotTable:
    """One array a field, of length max_slots; `tokens`, `logprobs` and `versions` have a second axis over the
    generated tokens, `stops` over a request's stop tokens.

    last_token: the newest token, whose KV is not computed yet; position: its place in the sequence. count: tokens
    generated so far; limit: their greatest number."""

    def __init__(self, max_slots: int) -> None:
        self.num_active = 0
        self.last_token = np.zeros(max_slots, dtype=np.int64)
        self.position = np.zeros(max_slots, dtype=np.int64)
        self.count = np.zeros(max_slots, dtype=np.int64)
        self.limit = np.zeros(max_slots, dtype=np.int64)
        self.stream = np.zeros(max_slots, dtype=np.uint64)
        self.temperature = np.zeros(max_slots, dtype=np.float32)
        self.top_p = np.zeros(max_slots, dtype=np.float32)
        self.top_k = np.zeros(max_slots, dtype=np.int64)
        self.min_p = np.zeros(max_slots, dtype=np.float32)
        self.repetition_penalty = np.ones(max_slots, dtype=np.float32)
        self.stops: Array = np.full((max_slots, 1), _NO_TOKEN, dtype=np.int64)
        self.tokens: Array = np.zeros((max_slots, 16), dtype=np.int32)
        self.logprobs: Array = np.zeros((max_slots, 16), dtype=np.float32)
        self.versions: Array = np.zeros((max_slots, 16), dtype=np.int32)
        self.sequences: list[Sequence] = []

    @property
    def sampling(self) -> SamplingColumns:
        n = self.num_active
        return SamplingColumns(self.temperature[:n], self.top_p[:n], self.top_k[:n], self.min_p[:n])

    def add(self, sequences: list[Sequence]) -> None:
        """Gives each the next slot. All of their tokens so far have KV; `record` brings the first new one."""
        if not sequences:
            return
        rows = slice(self.num_active, self.num_active + len(sequences))
        params = [sequence.request.sampling for sequence in sequences]
        self.count[rows] = [len(sequence.tokens) for sequence in sequences]
        self.position[rows] = [len(sequence.request.tokens) - 1 for sequence in sequences]
        self.position[rows] += self.count[rows]
        self.limit[rows] = [one.max_tokens for one in params]
        self.stream[rows] = [sequence.stream for sequence in sequences]
        self.temperature[rows] = [one.temperature for one in params]
        self.top_p[rows] = [one.top_p for one in params]
        self.top_k[rows] = [one.top_k for one in params]
        self.min_p[rows] = [one.min_p for one in params]
        self.repetition_penalty[rows] = [one.repetition_penalty for one in params]
        self._set_stops(rows.start, [one.stop_token_ids for one in params])
        self._widen(int(self.count[rows].max()))
        for row, sequence in enumerate(sequences, start=rows.start):
            if count := len(sequence.tokens):
                self.tokens[row, :count] = sequence.tokens
                self.logprobs[row, :count] = sequence.logprobs
                self.versions[row, :count] = sequence.versions
        self.sequences += sequences
        self.num_active = rows.stop

    def record(self, tokens: Array, logprobs: Array, version: int) -> tuple[Array, Array]:
        """Appends one token to every active slot. Bool (num_active,): those that ended, those that ended by a stop
        token."""
        n = self.num_active
        rows, count = np.arange(n), self.count[:n]
        self._widen(int(count.max()) + 1)
        self.tokens[rows, count] = tokens
        self.logprobs[rows, count] = logprobs
        self.versions[rows, count] = version
        self.last_token[:n] = tokens
        self.count[:n] += 1
        self.position[:n] += 1
        has_stopped = (self.stops[:n] == tokens[:, None]).any(axis=1)
        return has_stopped | (self.count[:n] >= self.limit[:n]), has_stopped

    def remove(self, rows: Array) -> tuple[list[Sequence], Array, Array]:
        """Takes out slots `rows`: (their sequences, brought up to date, and the moves made: row source[i] is now row
        target[i])."""
        removed = [self._updated(row) for row in rows.tolist()]
        source, target = moves_into_holes(self.position[: self.num_active], rows)
        self.num_active -= len(rows)
        if len(source):
            for values in vars(self).values():
                if isinstance(values, np.ndarray):
                    values[target] = values[source]
            moved = [self.sequences[row] for row in source.tolist()]
            for row, sequence in zip(target.tolist(), moved, strict=True):
                self.sequences[row] = sequence
        del self.sequences[self.num_active :]
        return removed, source, target

    def _updated(self, row: int) -> Sequence:
        sequence, count = self.sequences[row], self.count[row]
        sequence.tokens = self.tokens[row, :count].copy()
        sequence.logprobs = self.logprobs[row, :count].copy()
        sequence.versions = self.versions[row, :count].copy()
        return sequence

    def _set_stops(self, first_row: int, stops: list[tuple[int, ...]]) -> None:
        missing = max(len(one) for one in stops) - self.stops.shape[1]
        if missing > 0:
            self.stops = np.pad(self.stops, ((0, 0), (0, missing)), constant_values=_NO_TOKEN)
        self.stops[first_row : first_row + len(stops)] = _NO_TOKEN
        for row, one in enumerate(stops, start=first_row):
            self.stops[row, : len(one)] = one

    def _widen(self, tokens: int) -> None:
        """Makes room for `tokens` generated tokens a slot."""
        width = self.tokens.shape[1]
        if tokens > width:
            pad = ((0, 0), (0, max(tokens, 2 * width) - width))
            self.tokens = np.pad(self.tokens, pad)
            self.logprobs = np.pad(self.logprobs, pad)
            self.versions = np.pad(self.versions, pad)


def moves_into_holes(positions: Array, holes: Array) -> tuple[Array, Array]:
    """(source, target): which rows move where, all at once, so that rows without `holes` are dense again.

    Where lengths differ much, rows stay roughly ordered, the longest first, so that neighbours are of like length and
    attention reads little beyond each: a hole is filled from a quarter of the rows further on, that hole likewise, and
    so on to the last row. Otherwise the last row fills the hole directly."""
    num = len(positions)
    remaining = num - len(holes)
    if not remaining:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    stride = max(num // 4, 1) if positions.max() > 2 * positions.mean() else num
    content = list(range(num))
    for last, hole in zip(range(num - 1, -1, -1), sorted(holes.tolist(), reverse=True), strict=False):
        while hole < last:
            following = min(hole + stride, last)
            content[hole] = content[following]
            hole = following
    target = np.array([row for row in range(remaining) if content[row] != row], dtype=np.int64)
    return np.array(content, dtype=np.int64)[target], target
