"""A name for one start of all nodes, which no other start has.

torchrun's store may outlive a start, with addresses of the dead in it. How often torchrun began anew does not tell
starts apart: it counts, node by node, those that the node's own controller made necessary.

    rank r: writes a word of its own to hello/r, waits for name/WORD, says that it has joined
    rank 0: has chosen the name; answers every hello that it finds, also of the dead, until all have joined
"""

from __future__ import annotations

import time
import uuid
from typing import Protocol

_LOOK_S = 0.05


class Store(Protocol):
    """torch's, without its waits."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


def name_of_start(store: Store, rank: int, world_size: int, timeout_s: float) -> str:
    """The same on all ranks. Raises TimeoutError naming those that did not come."""
    word = uuid.uuid4().hex
    deadline = time.monotonic() + timeout_s
    if rank > 0:
        store.set(f"hello/{rank}", word)
        while not store.check([f"name/{word}"]):
            _sleep_until(deadline, "node 0 has not answered")
        name = store.get(f"name/{word}").decode()
        store.set(f"{name}/joined/{rank}", "")
        return name
    while missing := [other for other in range(1, world_size) if not store.check([f"{word}/joined/{other}"])]:
        for other in missing:
            if store.check([f"hello/{other}"]):
                store.set(f"name/{store.get(f'hello/{other}').decode()}", word)
        _sleep_until(deadline, f"nodes {missing} have not come")
    return word


def _sleep_until(deadline: float, complaint: str) -> None:
    """A moment. Raises TimeoutError with the complaint after the deadline."""
    if time.monotonic() > deadline:
        raise TimeoutError(complaint)
    time.sleep(_LOOK_S)
