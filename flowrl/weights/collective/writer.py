"""A trainer rank's writer where versions go by torch.distributed: casts into staging, from which engines are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowrl.weights.collective.giver import Giver, Terms
from flowrl.weights.collective.staging import Staged, Staging
from flowrl.weights.collective.wire import Hello
from flowrl.weights.plan import Plan, joined
from flowrl.weights.pool import OnPublished
from flowrl.weights.ranks import Ranks

NO_PATH = Path()  # a version that lies nowhere

Listen = Callable[[Callable[[dict[str, Any]], None]], None]


@dataclass(frozen=True)
class Collective:
    """listen(callback): has it called, in any thread, with the `EngineNews` of each engine there is or will be."""

    terms: Terms
    listen: Listen


class CollectiveWriter:
    """Of this rank. on_published: called on rank 0, with no path."""

    def __init__(self, plan: Plan, ranks: Ranks, collective: Collective, on_published: OnPublished) -> None:
        self._ranks = ranks.apart()
        self._rank = rank = ranks.rank
        self._on_published = on_published
        self._pieces = plan.pieces(rank)
        num_bytes = sum(piece.kind.num_bytes for piece in self._pieces)
        self._staging = Staging(num_bytes, collective.terms.device, arbitrates=rank == 0)
        self._staged: Staged | None = None
        self._views: dict[int, list[torch.Tensor]] = {}
        hello = Hello(
            rank,
            plan.num_ranks,
            plan.fingerprint,
            joined((piece.begin, piece.end) for piece in self._pieces),
            plan.layout.num_bytes,
            plan.layout.header,
        )
        self._giver = Giver(hello, self._staging, collective.terms)
        collective.listen(self._giver.meet)

    def open(self, version: int) -> None:
        self._staged = self._staging.open()

    def write(self, tensors: Mapping[str, torch.Tensor]) -> None:
        assert self._staged is not None, "opened before"
        for piece, view in zip(self._pieces, self._views_of(self._staged), strict=True):
            view.copy_(tensors[piece.name])
        if self._staged.bytes.device.type == "cuda":
            # The givers' threads read it on streams of their own.
            torch.cuda.current_stream(self._staged.bytes.device).synchronize()

    def agree(self, version: int, error: Exception | None) -> None:
        self._ranks.agree(error, f"version {version}")

    def commit(self, version: int, pin: str) -> Path | None:
        assert self._staged is not None, "written before"
        assert not pin, "a version that lies nowhere cannot be pinned"
        self._staging.show(self._staged, version)
        if self._rank == 0:
            self._on_published(version, NO_PATH)
        return None

    def abandon(self) -> None:
        self._staged = None

    def discard_newer_than(self, version: int) -> None:
        self._staging.discard_newer_than(version)

    def close(self) -> None:
        self._giver.close()
        self._ranks.close()

    def _views_of(self, staged: Staged) -> list[torch.Tensor]:
        key = staged.bytes.data_ptr()
        if key not in self._views:
            found, at = [], 0
            for piece in self._pieces:
                part = staged.bytes[at : at + piece.kind.num_bytes]
                found.append(part.view(piece.kind.dtype).view(piece.kind.shape))
                at += piece.kind.num_bytes
            self._views[key] = found
        return self._views[key]
