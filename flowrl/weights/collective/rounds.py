"""How the bytes of a version are dealt out to the rounds of a transfer. Pure.

A rank's *stream* is what it writes of the version's file, one range after the other. In each round every rank sends the
next bytes of its stream, all ranks together at most a bucket; ranks with shorter streams are done earlier.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from flowrl.weights.loading import Place
from flowrl.weights.slices import Range

_ALIGNMENT = 8  # of the widest dtype, so that no element is cut in two


class Landing(NamedTuple):
    """Bytes [begin, end) of a rank's part of a round are these elements of the tensor `name`, of the dtype that they
    travel in."""

    name: str
    begin: int
    end: int
    target: torch.Tensor
    dtype: torch.dtype


@dataclass(frozen=True)
class Rounds:
    """ranges: of the file, for each rank, sorted. bucket_bytes: of all ranks in one round."""

    ranges: Sequence[Sequence[Range]]
    bucket_bytes: int

    @property
    def each(self) -> int:
        """The most that one rank sends in a round."""
        return max(_ALIGNMENT, self.bucket_bytes // len(self.ranges) // _ALIGNMENT * _ALIGNMENT)

    @property
    def count(self) -> int:
        return max(-(-self.num_bytes(rank) // self.each) for rank in range(len(self.ranges)))

    def num_bytes(self, rank: int) -> int:
        return sum(end - begin for begin, end in self.ranges[rank])

    def part(self, rank: int, round_: int) -> Range:
        """Of the rank's stream; empty once it is done."""
        length = self.num_bytes(rank)
        return min(round_ * self.each, length), min((round_ + 1) * self.each, length)

    def refuse_gaps(self, begin: int, end: int) -> None:
        """Raises ValueError unless the streams are the bytes [begin, end) of the file, each once."""
        at = begin
        for first, after in sorted(piece for ranges in self.ranges for piece in ranges):
            if first != at:
                raise ValueError(f"weights: byte {min(first, at)} of a version is sent by no rank, or by two")
            at = after
        if at != end:
            raise ValueError(f"weights: ranks send {at} bytes of a version that has {end}")

    def landings(self, rank: int, round_: int, places: Sequence[Place]) -> list[Landing]:
        """Where a rank's part of a round belongs. places: of all tensors, sorted by their first byte."""
        begins = [place.begin for place in places]
        found = []
        at = 0
        for begin, end in cut(self.ranges[rank], *self.part(rank, round_)):
            index = bisect_right(begins, begin) - 1
            while begin < end:
                place = places[index]
                taken = min(end, place.end) - begin
                first, size = begin - place.begin, place.dtype.itemsize
                target = place.target[first // size : (first + taken) // size]
                found.append(Landing(place.name, at, at + taken, target, place.dtype))
                at, begin, index = at + taken, begin + taken, index + 1
        return found


def cut(ranges: Sequence[Range], begin: int, end: int) -> list[Range]:
    """The bytes [begin, end) of a stream, as ranges of the file."""
    found = []
    at = 0
    for first, after in ranges:
        low, high = max(begin, at), min(end, at + after - first)
        if low < high:
            found.append((first + low - at, first + high - at))
        at += after - first
    return found
