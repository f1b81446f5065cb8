"""Between a GPU and the host's memory: values are cast on the GPU, and travel without a stop where the host's pages are
registered with CUDA. A blocking copy of torch does neither: it casts on the host, in memory made for that.
"""

from __future__ import annotations

import logging
import mmap
from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch

logger = logging.getLogger(__name__)


def copy_to_host(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """target.copy_(source) for each (target, source); all are there on return. Targets are contiguous."""
    devices = set()
    for target, source in pairs:
        target.copy_(source, non_blocking=source.is_cuda)
        if source.is_cuda:
            devices.add(source.device)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()


class Registered:
    """The pages that `tensors`, on the host, lie in are registered with CUDA until `close`, which has to come before
    they are unmapped. Where CUDA will not have them, copies go by its own staging: slower, and said once."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._begins: list[int] = []
        for begin, end in page_ranges([(tensor.data_ptr(), tensor.nbytes) for tensor in tensors]):
            code = int(torch.cuda.cudart().cudaHostRegister(begin, end - begin, 0))
            if code:
                logger.warning(
                    "weights: CUDA would not register shared memory (error %d): copies to it are slower", code
                )
                with suppress(RuntimeError):
                    torch.zeros(1, device="cuda")  # torch can only be rid of the error by raising it
                break
            self._begins.append(begin)

    def close(self) -> None:
        for begin in self._begins:
            torch.cuda.cudart().cudaHostUnregister(begin)
        self._begins.clear()


def page_ranges(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """[begin, end) of the whole pages that the spans (address, bytes) touch, in order, none overlapping another."""
    size = mmap.PAGESIZE
    found: list[tuple[int, int]] = []
    for begin, end in sorted((at // size * size, -(-(at + count) // size) * size) for at, count in spans if count):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
