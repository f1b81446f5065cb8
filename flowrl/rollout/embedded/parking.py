"""Weights in host memory while the device's is lent to others.

Whatever shares memory goes on sharing it: tied embeddings, and projections that are views of one tensor. So it is the
storages that are emptied and filled again, and no tensor is touched.
"""

from __future__ import annotations

import torch
from torch import UntypedStorage, nn


class ParkedWeights:
    """Parks on construction: the parameters and buffers of `model` are unusable until `restore`."""

    def __init__(self, model: nn.Module) -> None:
        storages = [tensor.untyped_storage() for tensor in (*model.parameters(), *model.buffers())]
        distinct = {storage.data_ptr(): storage for storage in storages if storage.nbytes()}
        self._parked = [(storage, _host_copy(storage)) for storage in distinct.values()]
        for storage, _ in self._parked:
            storage.resize_(0)

    def restore(self) -> None:
        for storage, copy in self._parked:
            storage.resize_(copy.nbytes())
            storage.copy_(copy)
        self._parked = []


def _host_copy(storage: UntypedStorage) -> UntypedStorage:
    copy = torch.empty(storage.nbytes(), dtype=torch.uint8).untyped_storage()
    copy.copy_(storage)
    return copy
