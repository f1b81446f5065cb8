"""Those of one start find each other in a store that remembers earlier ones."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from controllers.meeting import name_of_start


class Remembering:
    """As torch's store, in this process."""

    def __init__(self) -> None:
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def set(self, key: str, value: str) -> None:
        with self._lock:
            self._values[key] = value.encode()

    def get(self, key: str) -> bytes:
        with self._lock:
            return self._values[key]

    def check(self, keys: list[str]) -> bool:
        with self._lock:
            return all(key in self._values for key in keys)


def start(store: Remembering, num_nodes: int) -> set[str]:
    with ThreadPoolExecutor(num_nodes) as nodes:
        return set(nodes.map(lambda rank: name_of_start(store, rank, num_nodes, 10.0), reversed(range(num_nodes))))


def test_each_start_has_one_name_of_its_own() -> None:
    store = Remembering()
    names = [start(store, 4) for _ in range(3)]
    assert all(len(found) == 1 for found in names) and len(set.union(*names)) == 3


def test_a_node_that_died_while_it_waited_is_not_taken_for_its_successor() -> None:
    store = Remembering()
    with pytest.raises(TimeoutError, match="node 0 has not answered"):
        name_of_start(store, 1, 2, 0.1)
    with pytest.raises(TimeoutError, match=r"nodes \[1\] have not come"):
        name_of_start(store, 0, 2, 0.2)
    assert len(start(store, 2)) == 1
