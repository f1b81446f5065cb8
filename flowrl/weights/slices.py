"""How a version is cut for its way between nodes, and who gives which slice to whom. Pure.

    slice i of node o's bytes:  o -> receiver i mod n -> the other receivers

So a node that holds bytes sends each of them once, however many nodes need it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

SLICE_BYTES = 4 << 20

Range = tuple[int, int]


class Slice(NamedTuple):
    """Bytes [begin, end) of the file, one range after the other; `owner`: the node whose ranks write them."""

    owner: int
    ranges: tuple[Range, ...]

    @property
    def num_bytes(self) -> int:
        return sum(end - begin for begin, end in self.ranges)


class Holdings(msgspec.Struct, frozen=True):
    """Which bytes of every version each node's trainer ranks write. file_name: of the version's file; texts: of small
    files that go beside it, by name."""

    num_bytes: int
    ranges: dict[int, list[Range]]
    file_name: str = "model.safetensors"
    texts: dict[str, str] = {}

    @classmethod
    def of(cls, nodes: Sequence[int], held: Sequence[Sequence[Range]], num_bytes: int) -> Holdings:
        """held: by each of `nodes`."""
        return cls(num_bytes, {node: list(ranges) for node, ranges in zip(nodes, held, strict=True)})

    def slices(self, slice_bytes: int = SLICE_BYTES) -> list[Slice]:
        """The same on all nodes. Raises ValueError unless every byte is held exactly once."""
        self._refuse_gaps()
        found = []
        for owner, ranges in sorted(self.ranges.items()):
            found += [Slice(owner, part) for part in _cut(ranges, slice_bytes)]
        return found

    def needy(self, serving: Sequence[int]) -> list[int]:
        """Of the nodes that serve, those that do not hold everything."""
        complete = next(iter(self.ranges)) if len(self.ranges) == 1 else None
        return [node for node in sorted(serving) if node != complete]

    def _refuse_gaps(self) -> None:
        end = 0
        for begin, after in sorted(piece for ranges in self.ranges.values() for piece in ranges):
            if begin != end:
                number = "no node" if begin > end else "two nodes"
                raise ValueError(f"weights: byte {min(begin, end)} of a version is held by {number}")
            end = after
        if end != self.num_bytes:
            raise ValueError(f"weights: nodes hold {end} bytes of a version that has {self.num_bytes}")


def giver(index: int, owner: int, needy: Sequence[int], node: int) -> int:
    """The node from which `node` gets slice `index`."""
    receivers = [other for other in needy if other != owner]
    first = receivers[index % len(receivers)]
    return owner if node == first else first


def _cut(ranges: Sequence[Range], slice_bytes: int) -> list[tuple[Range, ...]]:
    slices: list[tuple[Range, ...]] = []
    current: list[Range] = []
    room = slice_bytes
    for begin, end in ranges:
        while begin < end:
            taken = min(room, end - begin)
            current.append((begin, begin + taken))
            begin, room = begin + taken, room - taken
            if not room:
                slices.append(tuple(current))
                current, room = [], slice_bytes
    return [*slices, tuple(current)] if current else slices
