"""How much of its time a mapped stage waits for rows: told to the controller every few seconds, as two metrics."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from controllers.context import WorkerContext

TELL_EVERY_S = 10.0


class IdleAccount:
    """Of one stage, in its own thread. Reports `perf/idle_s/STAGE` and `perf/span_s/STAGE`: seconds of waiting, and in
    all, since the last report."""

    def __init__(self, context: WorkerContext, stage: str) -> None:
        self._context = context
        self._stage = stage
        self._began = time.monotonic()
        self._idle_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.monotonic()
        with self._context.waiting_for(f"rows for stage {self._stage}"):
            yield
        self._idle_s += time.monotonic() - began

    def tell(self, *, is_last: bool = False) -> None:
        """If it is time to, or for the last time."""
        span_s = time.monotonic() - self._began
        if span_s < TELL_EVERY_S and not is_last:
            return
        self._context.report({f"perf/idle_s/{self._stage}": self._idle_s, f"perf/span_s/{self._stage}": span_s})
        self._began += span_s
        self._idle_s = 0.0
