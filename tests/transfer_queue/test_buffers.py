"""Memory is used again when nobody refers to it, and never before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from transfer_queue.buffers import KEPT_BYTES, SMALL_BYTES, Buffers

SIZE = 4 * SMALL_BYTES


def address(array: np.ndarray) -> int:
    return array.__array_interface__["data"][0]


def test_free_memory_is_used_again() -> None:
    buffers = Buffers()
    first = address(buffers.take(SIZE))
    assert address(buffers.take(SIZE)) == first
    assert address(buffers.take(SIZE - 100)) == first
    assert address(buffers.take(SIZE // 4)) != first, "much larger than what is asked for"


@pytest.mark.parametrize(
    "keep",
    [
        lambda array: array,
        lambda array: array.view(np.int64)[10:20].reshape(2, 5),
        lambda array: memoryview(array)[5:9],
        lambda array: torch.from_numpy(array)[3:].view(torch.uint8),
        lambda array: {"deep": [array[:1]]},
    ],
)
def test_memory_that_anything_refers_to_is_left_alone(keep: Callable[[Any], Any]) -> None:
    buffers = Buffers()
    kept = keep(buffers.take(SIZE))
    others = [buffers.take(SIZE) for _ in range(3)]
    assert len({address(array) for array in others}) == 3
    first = address(buffers._kept[0])
    assert first not in {address(array) for array in others}
    del kept
    assert address(buffers.take(SIZE)) == first


def test_what_is_kept_is_bounded() -> None:
    buffers = Buffers()
    held = [buffers.take(KEPT_BYTES // 2) for _ in range(5)]
    assert sum(map(len, buffers._kept)) <= KEPT_BYTES
    assert len({address(array) for array in held}) == 5
