"""The servers of one engine: opened, told the same things, failed together. What they are told is `engine.py`'s.

Servers that were told different things would serve different policies, so an order that one of them does not follow is
the failure of all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from flowrl.rollout.engine import EngineError
from flowrl.rollout.sglang.arguments import ServerSettings
from flowrl.rollout.sglang.client import ServerInfo, SGLangClient
from flowrl.rollout.sglang.server import ServerProcess

Call = Callable[[SGLangClient], Awaitable[None]]


class Fleet:
    """on_failure is called once, with what every later use raises. Who opens it closes it."""

    def __init__(self, on_failure: Callable[[EngineError], None]) -> None:
        self._on_failure = on_failure
        self._clients: list[SGLangClient] = []
        self._processes: list[ServerProcess] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._failure = ""

    async def launch(self, settings: Sequence[ServerSettings], model: Path, version: int) -> None:
        """Servers of our own, on `model`, all at once. Returns when they generate."""
        self._processes = [ServerProcess(one) for one in settings]
        for process in self._processes:
            await process.launch(model, version)
            self._clients.append(SGLangClient(process.url, process.name))
        pairs = zip(self._processes, self._clients, strict=True)
        await asyncio.gather(*(process.ready(client) for process, client in pairs))
        self._watchers = [asyncio.create_task(self._watch(process)) for process in self._processes]

    def connect(self, urls: Sequence[str]) -> None:
        """Servers that run already. Whether they answer shows at the first call."""
        self._clients = [SGLangClient(url, f"SGLang server {url}") for url in urls]

    async def close(self) -> None:
        for watcher in self._watchers:
            watcher.cancel()
        await self.fail("the engine was closed")
        await asyncio.gather(*(process.close() for process in self._processes))

    def check(self) -> None:
        """EngineError if it has failed."""
        if self._failure:
            raise EngineError(self._failure)

    def clients(self) -> list[SGLangClient]:
        return self._clients

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
