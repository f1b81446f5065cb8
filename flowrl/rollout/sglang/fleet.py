"""The servers of one engine: opened, told the same things, and brought back when they are lost.

Servers that were told different things would serve different policies. So one that does not follow an order serves no
more: it is ended, started anew in the background, and serves again only when the engine has given it what the others
have. When none is left to serve, all of it has failed. What servers are told is `engine.py`'s.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from flowrl.rollout.engine import EngineError
from flowrl.rollout.sglang.arguments import ServerSettings
from flowrl.rollout.sglang.client import ServerGone, ServerInfo, SGLangClient
from flowrl.rollout.sglang.member import Member, MemberState
from flowrl.weights.store import reading

Call = Callable[[SGLangClient], Awaitable[None]]

_FIRST_PAUSE_S = 1.0
_LONGEST_PAUSE_S = 300.0
_LOOK_AGAIN_S = 0.5
_EXIT_S = 10.0  # from a broken connection to the news of the process's end


class Weights(NamedTuple):
    path: Path
    version: int


class Owner(Protocol):
    """What the fleet asks of its engine. `failed` is called once, with what every later use raises. `lost`: a member
    serves no more. `welcome`: brings one that has started on `weights` to where the others are, and marks it SERVING;
    FileNotFoundError if the newest weights are gone. `newest`: what the others have."""

    def failed(self, error: EngineError) -> None: ...

    def lost(self, member: Member) -> None: ...

    async def welcome(self, member: Member, weights: Weights) -> None: ...

    def newest(self) -> Weights: ...

    def log(self, line: str) -> None: ...


class Fleet:
    """Who opens it closes it."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._members: list[Member] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure = ""
        self._losing = asyncio.Lock()
        self.num_orders = 0

    async def launch(self, settings: Sequence[ServerSettings], weights: Weights) -> None:
        """Servers of our own, all at once. Returns when they generate."""
        self._members = [Member(number, settings=one) for number, one in enumerate(settings)]
        for member in self._members:
            await member.launch(*weights)
        await asyncio.gather(*(member.ready() for member in self._members))
        for member in self._members:
            self.serve(member)

    async def connect(self, urls: Sequence[str], weights: Weights) -> None:
        """Servers that run already. Whether they answer shows at the first call."""
        self._members = [Member(number, url=url) for number, url in enumerate(urls)]
        for member in self._members:
            await member.launch(*weights)
            self.serve(member)

    async def close(self) -> None:
        await self._fail("the engine was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(member.close() for member in self._members))

    def check(self) -> None:
        """EngineError if it has failed."""
        if self._failure:
            raise EngineError(self._failure)

    def serving(self) -> list[Member]:
        return [member for member in self._members if member.state is MemberState.SERVING]

    def serve(self, member: Member) -> None:
        """From now on it takes requests and orders."""
        member.state = MemberState.SERVING
        if member.is_ours:
            self._begin(self._watch(member))

    async def infos(self) -> list[ServerInfo]:
        return [await member.client.server_info() for member in self.serving()]

    def member(self, number: int) -> Member:
        return self._members[number]

    async def order(self, call: Call) -> None:
        """The same call to every server. One that does not follow is lost; EngineError when none is left."""
        self.num_orders += 1
        try:
            await self.ask(call)
        except BaseException as error:
            await self._fail(f"a change of the weights was interrupted: {type(error).__name__} {error}")
            raise

    async def ask(self, call: Call) -> None:
        """As `order`, where it does no harm that only some of them heed it should it be interrupted."""
        members = self.serving()
        results = await asyncio.gather(*(call(member.client) for member in members), return_exceptions=True)
        for member, result in zip(members, results, strict=True):
            if isinstance(result, EngineError):
                await self.lose(member, str(result), broke_off=isinstance(result, ServerGone))
            elif isinstance(result, BaseException):
                raise result
        self.check()

    async def lose(self, member: Member, reason: str, *, broke_off: bool = False) -> None:
        """It serves no more; calls underway to it break off. Returns when it is known whether others go on. broke_off:
        a call did, and the end of the process, if it has ended, would say more."""
        async with self._losing:
            if member.state is not MemberState.SERVING or self._failure:
                return
            await member.cut_off()
            if not self.serving():
                return await self._fail(await _last_words(member, reason, broke_off))
            self._owner.lost(member)
        self._begin(self._bring_back(member, reason, broke_off))

    async def _bring_back(self, member: Member, reason: str, broke_off: bool) -> None:
        num_left, reason = len(self.serving()), await _last_words(member, reason, broke_off)
        self._owner.log(f"{reason}\n{num_left} of {len(self._members)} servers go on, and it is started again")
        pause_s = _FIRST_PAUSE_S
        while not self._failure:
            try:
                await member.close()
                weights = self._owner.newest()
                with reading(weights.path):
                    await member.launch(*weights)
                    await member.ready()
                await self._welcome(member, weights)
                return
            except (EngineError, OSError) as error:
                self._owner.log(f"server {member.number} was not brought back, next try in {pause_s:g} s: {error}")
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _welcome(self, member: Member, weights: Weights) -> None:
        """Waits for weights that are still there: those after them are published in time."""
        while True:
            with suppress(FileNotFoundError):
                await self._owner.welcome(member, weights)
                self._owner.log(f"{member.name} serves again, version {self._owner.newest().version}")
                return
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _watch(self, member: Member) -> None:
        reason = await member.exited()
        await self.lose(member, f"{member.name} ended: {reason}")

    async def _fail(self, reason: str) -> None:
        """The first failure is the one that is told. Calls underway break off."""
        if self._failure:
            return
        self._failure = f"{reason}\nThe engine must be restarted."
        self._owner.failed(EngineError(self._failure))
        for member in self.serving():
            await member.cut_off()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _last_words(member: Member, reason: str, broke_off: bool) -> str:
    if broke_off and member.is_ours:
        with suppress(TimeoutError):
            return f"{member.name} ended: {await asyncio.wait_for(member.exited(), _EXIT_S)}"
    return reason
