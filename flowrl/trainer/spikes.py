"""Gradient norms that stand out from those before them: counted, so that a run's instability shows as one number."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

# A spike is a norm above FACTOR times the median of the last WINDOW, once LEAST of them are known.
FACTOR = 5.0
WINDOW = 100
LEAST = 10


class GradientSpikes:
    """`num` counts them since the run began. A spike joins the window as well: where large norms stay, they become the
    measure."""

    def __init__(self) -> None:
        self.num = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)

    def add(self, norm: float) -> None:
        # Batches without any gradient say nothing of what is usual.
        if norm == 0.0:
            return
        if len(self._recent) >= LEAST and norm > FACTOR * statistics.median(self._recent):
            self.num += 1
        self._recent.append(norm)

    def state(self) -> tuple[int, list[float]]:
        """For a checkpoint, as JSON."""
        return self.num, list(self._recent)

    def restore(self, state: Sequence) -> None:
        self.num, recent = state
        self._recent = deque(recent, maxlen=WINDOW)
