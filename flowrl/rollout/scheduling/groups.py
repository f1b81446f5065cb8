"""How the samples of one group end: together, the first so many of them, or with a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from flowrl.rollout.failure import Failure

Outcome = TypeVar("Outcome")


async def first_to_end(
    candidates: Sequence[Coroutine[Any, Any, Outcome | Failure]], wanted: int, accept: Callable[[int, Outcome], None]
) -> Failure | None:
    """Runs the candidates at once and calls `accept(place, outcome)` for the first `wanted` of them, once for each
    place from 0 to `wanted` - 1; the others are cancelled. Candidate i takes place i as soon as it ends; those beyond
    take, at the end, the places whose own candidates were slower. With fewer than `wanted` left that can still end
    well: the failure, and nothing runs any more. Raises what a candidate raises."""
    tasks = [asyncio.create_task(candidate) for candidate in candidates]
    ended: asyncio.Queue[int] = asyncio.Queue()
    for place, task in enumerate(tasks):
        task.add_done_callback(lambda _, place=place: ended.put_nowait(place))  # type: ignore[misc]
    missing, num_failed = list(range(wanted)), 0
    spares: list[Outcome] = []
    try:
        while len(spares) < len(missing):
            place = await ended.get()
            outcome = tasks[place].result()
            if isinstance(outcome, Failure):
                num_failed += 1
                if len(tasks) - num_failed < wanted:
                    return outcome
            elif place < wanted:
                missing.remove(place)
                accept(place, outcome)
            else:
                spares.append(outcome)
        for place, spare in zip(missing, spares, strict=True):
            accept(place, spare)
        return None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
