"""One server of a fleet, launched here or running elsewhere, and how to reach it. What it is told is `engine.py`'s.

DOWN -> STARTING -> SERVING -> DOWN
"""

from __future__ import annotations

import asyncio
import enum
from pathlib import Path

from flowrl.rollout.engine import EngineError
from flowrl.rollout.sglang.arguments import ServerSettings
from flowrl.rollout.sglang.client import SGLangClient
from flowrl.rollout.sglang.server import ServerProcess

_LOOK_EVERY_S = 2.0
_LOOK_TIMEOUT_S = 30.0
_ELSEWHERE_TIMEOUT_S = 600.0


class MemberState(enum.Enum):
    """DOWN: gone, or going. STARTING: takes no requests and no orders yet. SERVING: has what all of the fleet have."""

    DOWN = "down"
    STARTING = "starting"
    SERVING = "serving"


class Member:
    """`settings` of a server to launch, or the `url` of one that runs elsewhere. `client` is there once it has been
    launched or connected to; a client is closed with the server's loss, and the next start brings another."""

    client: SGLangClient

    def __init__(self, number: int, *, settings: ServerSettings | None = None, url: str = "") -> None:
        self.number = number
        self.state = MemberState.DOWN
        self._settings = settings
        self._url = url
        self._process: ServerProcess | None = None

    @property
    def is_ours(self) -> bool:
        return self._settings is not None

    @property
    def name(self) -> str:
        return self.client.name

    async def launch(self, model: Path, version: int) -> None:
        """Starts a server of ours on `model`, or opens the way to the other. It is not ready yet."""
        self.state = MemberState.STARTING
        if self._settings is None:
            self.client = SGLangClient(self._url, f"SGLang server {self._url}")
            return
        self._process = ServerProcess(self._settings)
        await self._process.launch(model, version)
        self.client = SGLangClient(self._process.url, self._process.name)

    async def ready(self) -> None:
        """Returns when it generates. EngineError if it ends first, or is late."""
        if self._process is not None:
            return await self._process.ready(self.client)
        deadline = asyncio.get_running_loop().time() + _ELSEWHERE_TIMEOUT_S
        while not await self.generates(_LOOK_TIMEOUT_S):
            if asyncio.get_running_loop().time() > deadline:
                raise EngineError(f"{self.name} has not answered for {_ELSEWHERE_TIMEOUT_S} s")
            await asyncio.sleep(_LOOK_EVERY_S)

    async def generates(self, timeout_s: float) -> bool:
        """False too if it cannot be reached."""
        try:
            return await self.client.generates(timeout_s)
        except EngineError:
            return False

    async def exited(self) -> str:
        """Waits for the end of a server of ours, and tells of it."""
        assert self._process is not None, "nobody hears of the end of a server that runs elsewhere"
        return await self._process.exited()

    async def cut_off(self) -> None:
        """Calls underway break off."""
        self.state = MemberState.DOWN
        await self.client.close()

    async def close(self) -> None:
        """A server of ours is gone when it returns."""
        if hasattr(self, "client"):
            await self.cut_off()
        if self._process is not None:
            await self._process.close()
