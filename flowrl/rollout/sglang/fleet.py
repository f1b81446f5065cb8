"""The servers of one engine: opened, told the same things, failed together. What they are told is `engine.py`'s.

Servers that were told different things would serve different policies, so an order that one of them does not follow is
the failure of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowrl.rollout.engine import EngineError
from flowrl.rollout.sglang.arguments import ServerSettings
from flowrl.rollout.sglang.client import ServerInfo, SGLangClient
from flowrl.rollout.sglang.server import ServerProcess

Call = Callable[[SGLangClient], Awaitable[None]]


@dataclass(eq=False)
class Endpoint:
    """num_running: requests that this engine has there."""

    client: SGLangClient
    num_running: int = 0


class Fleet:
    """on_failure is called once, with what every later use raises. Who opens it closes it."""

    def __init__(self, on_failure: Callable[[EngineError], None]) -> None:
        self._on_failure = on_failure
        self._endpoints: list[Endpoint] = []
        self._process: ServerProcess | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._failure = ""

    async def launch(self, settings: ServerSettings, model: Path, version: int) -> None:
        """One server of our own, on `model`. Returns when it generates."""
        self._process = process = ServerProcess(settings)
        await process.launch(model, version)
        client = SGLangClient(process.url, process.name)
        self._endpoints = [Endpoint(client)]
        await process.ready(client)
        self._watcher = asyncio.create_task(self._watch(process))

    def connect(self, urls: Sequence[str]) -> None:
        """Servers that run already. Whether they answer shows at the first call."""
        self._endpoints = [Endpoint(SGLangClient(url, f"SGLang server {url}")) for url in urls]

    async def close(self) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        await self.fail("the engine was closed")
        if self._process is not None:
            await self._process.close()

    def check(self) -> None:
        """EngineError if it has failed."""
        if self._failure:
            raise EngineError(self._failure)

    def least_busy(self) -> Endpoint:
        return min(self._endpoints, key=lambda endpoint: endpoint.num_running)

    def clients(self) -> list[SGLangClient]:
        return [endpoint.client for endpoint in self._endpoints]

    async def infos(self) -> list[ServerInfo]:
        return [await client.server_info() for client in self.clients()]

    async def order(self, call: Call) -> None:
        """The same call to every server; all of them, or EngineError and the fleet has failed."""
        try:
            await self.ask(call)
        except BaseException as error:
            await self.fail(str(error) or "a change of the weights was interrupted")
            if isinstance(error, EngineError):
                self.check()
            raise

    async def ask(self, call: Call) -> None:
        """The same call to every server, where it does no harm that only some of them heed it."""
        results = await asyncio.gather(*(call(client) for client in self.clients()), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def fail(self, reason: str) -> None:
        """The first failure is the one that is told. Calls underway break off."""
        if self._failure:
            return
        self._failure = f"{reason}\nThe engine must be restarted."
        self._on_failure(EngineError(self._failure))
        for client in self.clients():
            await client.close()

    async def _watch(self, process: ServerProcess) -> None:
        await self.fail(f"{process.name} ended: {await process.exited()}")
