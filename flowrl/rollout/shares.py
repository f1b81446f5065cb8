"""Whole shares of an update: what an engine reserves where `rollout.handover` is `batch`, or a run is to be repeatable.

An engine's share is batch_groups / engines groups. With `run.determinism: strict` the groups of every engine are the
same in every run: shards deal out numbers in order, and the engines of a node reserve in turn, once a version.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from controllers.context import WorkerContext
from flowrl.config import Recipe
from flowrl.config.recipe import is_strict
from transfer_queue.async_client import AsyncQueueClient
from transfer_queue.wire import Reservation

RESERVE_WAIT_S = 30.0


class Shares:
    """`reserve` one share after the other. Used from one asyncio loop."""

    def __init__(self, context: WorkerContext, recipe: Recipe, row_bytes: Callable[[], int]) -> None:
        self._context = context
        self._groups = recipe.train.batch_groups // context.world_size
        self._group_size = recipe.rollout.group_size
        self._row_bytes = row_bytes
        self._is_strict = is_strict(recipe)
        self._loaded_version = -1
        self._reserved_version = -1
        self._turn_of_version = -1 if context.index else None
        self._changed = asyncio.Event()

    def listen(self) -> None:
        """To the engine whose turn comes before this one's. Call it once, in the loop."""
        loop = asyncio.get_running_loop()

        def hear(news: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self._hear, int(news["version"]))

        if self._is_strict and self._context.index:
            self._context.on(self._topic(self._context.index - 1), hear)

    def loaded(self, version: int) -> None:
        """The engine has these weights, and the queue knows."""
        self._loaded_version = version
        self._changed.set()

    async def reserve(self, queue: AsyncQueueClient) -> list[Reservation]:
        """A whole share, sorted by group; waits for it as long as it takes."""
        if self._is_strict:
            await self._wait_for_turn()
        share: list[Reservation] = []
        while len(share) < self._groups:
            with self._context.waiting_for("room in the queue"):
                share += await queue.reserve(
                    self._context.name,
                    self._groups - len(share),
                    self._group_size,
                    row_bytes=self._row_bytes(),
                    wait_s=RESERVE_WAIT_S,
                )
        if self._is_strict:
            self._reserved_version = max(reservation.version for reservation in share)
            self._context.announce(
                self._topic(self._context.index), {"version": self._reserved_version}, everywhere=False
            )
        return sorted(share, key=lambda reservation: reservation.group)

    async def _wait_for_turn(self) -> None:
        """Until weights newer than those of the last share are loaded, and the engine before this one has its share
        under them."""
        with self._context.waiting_for("new weights, or the engine before this one to reserve"):
            while not self._is_our_turn():
                self._changed.clear()
                await self._changed.wait()

    def _is_our_turn(self) -> bool:
        is_new = self._loaded_version > self._reserved_version
        return is_new and (self._turn_of_version is None or self._turn_of_version >= self._loaded_version)

    def _hear(self, version: int) -> None:
        self._turn_of_version = version
        self._changed.set()

    def _topic(self, index: int) -> str:
        return f"share_reserved/{self._context.worker}/{index}"
