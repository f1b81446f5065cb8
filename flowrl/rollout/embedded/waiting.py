"""Who waits for its prompt to be computed, and what of it the next step computes. Pure bookkeeping.

Requests with the same prompt wait as one group: the prompt is computed once and every member gets a copy of its KV.
Groups go first come, first served, in chunks within a budget of tokens; therefore at most one group, the first, is
partly computed between two steps. A group that found fewer free slots than it has members stays first, one token short
of complete.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from flowrl.rollout.engine import GenerateRequest

Array = np.ndarray


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and what it has so far. `stream` keys its random numbers. tokens, logprobs, versions: as Generation;
    current only while the sequence has no slot."""

    request: GenerateRequest
    stream: np.uint64
    tokens: Array
    logprobs: Array
    versions: Array


@dataclass(slots=True, eq=False)
class Group:
    """`tokens`: what to compute, int64. `done`: of those, computed so far, in row `slot` of the prefill cache."""

    tokens: Array
    members: list[Sequence]
    done: int = 0
    slot: int = 0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [start, end) of a group, in this step. `num_admitted`: members that start to decode after it."""

    group: Group
    start: int
    end: int
    num_admitted: int

    @property
    def is_last(self) -> bool:
        return self.end == len(self.group.tokens)


@dataclass
class WaitingQueue:
    _groups: deque[Group] = field(default_factory=deque)
    _by_prompt: dict[tuple[int, ...], Group] = field(default_factory=dict)

    def __len__(self) -> int:
        """Groups waiting."""
        return len(self._groups)

    def add(self, sequence: Sequence) -> None:
        """Appends a new request, to the group of its prompt if one waits."""
        prompt = sequence.request.tokens
        group = self._by_prompt.get(prompt)
        if group is None:
            group = Group(np.array(prompt, dtype=np.int64), [])
            self._by_prompt[prompt] = group
            self._groups.append(group)
        group.members.append(sequence)

    def put_back(self, sequences: Iterable[Sequence]) -> None:
        """Puts requests that had begun before all others; what they generated is computed with their prompts."""
        groups = []
        for sequence in sequences:
            prompt = np.array(sequence.request.tokens, dtype=np.int64)
            groups.append(Group(np.concatenate([prompt, sequence.tokens]), [sequence]))
        self.forget_progress()
        self._groups.extendleft(reversed(groups))

    def forget_progress(self) -> None:
        """The weights changed: nothing computed under the old ones may start a request."""
        for group in self._groups:
            group.done = 0

    def remove(self, request_id: str | None) -> list[Sequence]:
        """Takes out one request, or all; those found."""
        removed = []
        for group in list(self._groups):
            leaving = [one for one in group.members if request_id is None or one.request.request_id == request_id]
            if leaving:
                removed += leaving
                group.members = [one for one in group.members if one not in leaving]
                if not group.members:
                    self._drop(group)
        return removed

    def plan(self, budget: int, free_slots: int) -> list[Chunk]:
        """Chunks of at most `budget` tokens together; no more members complete than there are `free_slots`."""
        chunks: list[Chunk] = []
        slots = iter(range(len(self._groups) + 1))
        kept_slot = self._groups[0].slot if self._groups and self._groups[0].done else None
        for group in self._groups:
            if budget <= 0 or free_slots <= 0:
                break
            if not group.done:
                group.slot = next(slot for slot in slots if slot != kept_slot)
            end = min(group.done + budget, len(group.tokens))
            num_admitted = min(free_slots, len(group.members)) if end == len(group.tokens) else 0
            chunks.append(Chunk(group, group.done, end, num_admitted))
            budget -= end - group.done
            free_slots -= num_admitted
        return chunks

    def finish(self, chunk: Chunk) -> list[Sequence]:
        """The chunk was computed: the members that it admits, no longer waiting."""
        group = chunk.group
        admitted = group.members[: chunk.num_admitted]
        group.members = group.members[chunk.num_admitted :]
        if group.members:
            group.done = min(chunk.end, len(group.tokens) - 1)
        else:
            self._drop(group)
        return admitted

    def _drop(self, group: Group) -> None:
        self._groups.remove(group)
        prompt = tuple(group.tokens.tolist())
        if self._by_prompt.get(prompt) is group:
            del self._by_prompt[prompt]
