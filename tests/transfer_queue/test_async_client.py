"""What only the asyncio face can do: many verbs at once, and verbs that are cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from transfer_queue.async_client import AsyncQueueClient
from transfer_queue.rows import Column

Make = Callable[..., Any]
TOKENS = {"tokens": Column.scalars([1.0], "float32")}


def test_parked_verbs_do_not_hold_up_others(serve: Make) -> None:
    async def main() -> None:
        async with AsyncQueueClient(serve().endpoint) as client:
            takes = [asyncio.create_task(client.take("reward", wait_s=30.0)) for _ in range(3)]
            await client.announce("p", 0)
            for group in await client.reserve("p", 3, 1):
                await client.put(group.keys, TOKENS)
            taken = await asyncio.gather(*takes)
            assert sorted(rows.keys[0].group for rows, _ in taken) == [0, 1, 2]

    asyncio.run(main())


def test_cancelled_reservation_gives_its_groups_back(serve: Make) -> None:
    async def main() -> None:
        async with AsyncQueueClient(serve().endpoint) as client:
            waiting = asyncio.create_task(client.reserve("p", 4, 1, wait_s=30.0))
            await asyncio.sleep(0.05)
            waiting.cancel()
            await client.announce("p", 0)
            assert len(await client.reserve("p", 4, 1, wait_s=5.0)) == 4

    asyncio.run(main())


def test_answer_that_nobody_waits_for_any_more_is_declined(serve: Make) -> None:
    """The answers cross the cancellations: all that they gave away must come back."""

    async def main() -> None:
        async with AsyncQueueClient(serve().endpoint) as client:
            await client.announce("p", 0)
            for _ in range(20):
                waiting = asyncio.create_task(client.reserve("p", 4, 1, wait_s=30.0))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                waiting.cancel()
            groups = await client.reserve("p", 4, 1, wait_s=5.0)
            while len(groups) < 4:
                more = await client.reserve("p", 4 - len(groups), 1, wait_s=5.0)
                assert more, "capacity was lost"
                groups += more
            for group in groups:
                await client.put(group.keys, TOKENS)
            for _ in range(20):
                lost = asyncio.create_task(client.take("reward", 4, wait_s=30.0))
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                lost.cancel()
            seen = set()
            while len(seen) < 4:
                taken = await client.take("reward", 4, wait_s=5.0)
                assert taken.rows.keys, "a row was lost"
                seen |= {key.group for key in taken.rows.keys}

    asyncio.run(main())
