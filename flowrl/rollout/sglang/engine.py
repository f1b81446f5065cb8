"""SGLangEngine: the `Engine` protocol over SGLang servers, launched here or already running. See docs/sglang.md.

It owns the order of the calls: what happens to requests and servers while weights change. Requests are `dispatch.py`'s,
the servers `fleet.py`'s, the HTTP `client.py`'s.

    closed -> ready -> paused -> ready     paused -> released -> paused     any but closed -> failed     any -> closed
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.rollout.engine import Capabilities, EngineError, GenerateRequest, Generation, PauseMode, check_lendable
from flowrl.rollout.sglang.arguments import ServerSettings, gpus_of_servers
from flowrl.rollout.sglang.checkpoint import Shapes, experts_shape, misfit, read_config, read_shapes, vocab_size
from flowrl.rollout.sglang.client import ServerInfo, SGLangClient
from flowrl.rollout.sglang.dispatch import Dispatch, Limits
from flowrl.rollout.sglang.fleet import Fleet, Weights
from flowrl.rollout.sglang.member import Member
from flowrl.weights.store import reading

_NOWHERE = Weights(Path(), -1)
_RETURN_EXPERTS = "enable_return_routed_experts"


@dataclass(frozen=True, kw_only=True)
class SGLangCapabilities(Capabilities):
    """takes_seeds: whether `SamplingParams.seed` has an effect. Only a server in its deterministic mode heeds it.
    steps_ahead: the server prepares decode steps ahead, see `versions.py`. parked: what `release_memory` frees."""

    takes_seeds: bool
    steps_ahead: bool
    parked: tuple[str, ...]


class SGLangEngine:
    """With `urls` the engine uses servers that run already (they hold the weights of this engine alone and see its file
    system); otherwise `start` launches `servers` of them. Each request goes to the least loaded, or to the one that has
    its prompt. Of several, one that is lost is started again while the others go on; `log` is told. Every
    `health_every_s` each has to generate within `health_timeout_s`. routed_experts: generations say which experts of a
    mixture each token went through. devices: GPUs, as `cuda:3`, which the servers share out. The other arguments are
    those of `ServerSettings`."""

    _fleet: Fleet | None
    _dispatch: Dispatch
    _paused: PauseMode | None
    _is_released: bool
    _capabilities: SGLangCapabilities | None
    _weights: Weights
    _held: Shapes
    _is_tied: bool
    _health: asyncio.Task[None] | None

    def __init__(
        self,
        *,
        python: str = sys.executable,
        device: str = "cuda",
        devices: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        server_args: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        log_path: Path = Path("sglang.log"),
        startup_timeout_s: float = 600.0,
        load_timeout_s: float = 600.0,
        health_every_s: float = 30.0,
        health_timeout_s: float = 30.0,
        urls: Sequence[str] = (),
        servers: int = 1,
        routed_experts: bool = False,
        log: Callable[[str], None] = lambda line: None,
    ) -> None:
        if servers < 1 or (servers > 1 and port):
            raise ValueError(f"servers: {servers}; at least 1, and of several each chooses its own port (port={port})")
        logs = [log_path, *(log_path.with_stem(f"{log_path.stem}.{number}") for number in range(1, servers))]
        self._settings = [
            ServerSettings(
                python=python,
                device=device,
                host=host,
                port=port,
                server_args={**(server_args or {}), **place, **({_RETURN_EXPERTS: True} if routed_experts else {})},
                env=env or {},
                log_path=log,
                startup_timeout_s=startup_timeout_s,
            )
            for log, place in zip(logs, gpus_of_servers(devices, servers, server_args or {}), strict=True)
        ]
        self._load_timeout_s = load_timeout_s
        self._health_every_s, self._health_timeout_s = health_every_s, health_timeout_s
        self._urls = tuple(urls)
        self._returns_experts = routed_experts
        self._control = asyncio.Lock()
        self.log = log
        self._reset()

    @property
    def version(self) -> int:
        return self._weights.version

    @property
    def capabilities(self) -> SGLangCapabilities:
        """EngineError before the engine is ready."""
        if self._capabilities is None:
            raise EngineError("SGLangEngine: not started")
        return self._capabilities

    async def start(self, path: Path, version: int) -> None:
        if self._fleet is not None:
            raise ValueError(f"version: {version}; the engine has been started already: restart or close it")
        config = read_config(path)
        self._held = read_shapes(path)
        self._is_tied = bool(config.get("tie_word_embeddings", False))
        self._fleet = fleet = Fleet(self)
        self._dispatch = Dispatch(fleet, len(self._urls) or len(self._settings))
        weights = Weights(path, version)
        try:
            if self._urls:
                await fleet.connect(self._urls, weights)
                await self._pause(PauseMode.RECOMPUTE)
                await self._load(weights)
                await self._resume()
            else:
                await fleet.launch(self._settings, weights)
            capabilities = _capabilities(await fleet.infos(), experts_shape(config) if self._returns_experts else None)
        except BaseException:
            await self.close()
            raise
        self._capabilities = capabilities
        self._dispatch.limits = Limits(
            max_model_tokens=capabilities.max_model_tokens,
            vocab_size=vocab_size(config),
            routed_experts=capabilities.routed_experts,
        )
        self._loaded(weights)
        self._health = asyncio.create_task(self._look_after())

    async def restart(self, path: Path, version: int) -> None:
        """Ends what runs and starts anew, after a failure for instance. Requests underway raise EngineError."""
        await self.close()
        await self.start(path, version)

    async def close(self) -> None:
        """Requests underway raise EngineError. Servers that were launched here are gone when it returns."""
        if self._health is not None:
            self._health.cancel()
        if self._fleet is not None:
            await self._fleet.close()
        self._reset()

    async def generate(self, request: GenerateRequest) -> Generation:
        self._usable()
        return await self._dispatch.generate(request)

    async def abort(self, request_id: str | None = None) -> None:
        """Returns when they have ended; those that a pause holds may do so only when it is over."""
        self._usable()
        sent = self._dispatch.flights.abort(request_id)
        await self._dispatch.end(sent)
        if self._paused is None:
            await self._dispatch.drain(sent)

    async def pause(self, mode: PauseMode) -> None:
        async with self._control:
            self._usable()
            self._check_memory("pause")
            await self._pause(mode)

    async def resume(self) -> None:
        async with self._control:
            self._usable()
            self._check_memory("resume")
            await self._resume()

    async def load_weights(self, path: Path, version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        """An engine that is paused stays so, and the mode is that of its pause. Weights of another model are refused
        before anything changes. A server that fails to load them serves no more: mixed weights never serve."""
        async with self._control:
            self._usable()
            self._check_memory("load_weights")
            await asyncio.to_thread(self._check_weights, path)
            was_paused = self._paused is not None
            if not was_paused:
                await self._pause(mode)
            await self._load(Weights(path, version))
            self._loaded(Weights(path, version))
            if not was_paused:
                await self._resume()

    async def release_memory(self) -> None:
        """The KV cache's, and the weights' of servers started with `enable_weights_cpu_backup`. Frees nothing without
        `enable_memory_saver`, nor on a CPU."""
        async with self._control:
            fleet = self._usable()
            check_lendable(self._paused)
            if not self._is_released:
                await fleet.order(self._release)
                self._is_released = True

    async def resume_memory(self) -> None:
        async with self._control:
            fleet = self._usable()
            if self._is_released:
                tags = self.capabilities.parked
                await fleet.order(lambda client: client.resume_memory(tags))
                self._is_released = False

    async def check_health(self) -> None:
        """EngineError if a server does not generate; one that is paused has only to answer."""
        for member in self._usable().serving():
            if self._paused is not None:
                await member.client.model_info()
            elif not await member.client.generates(self._health_timeout_s):
                raise EngineError(f"{member.name} answers and generates nothing")

    # What the fleet asks: see `fleet.Owner`.

    def failed(self, error: EngineError) -> None:
        self._dispatch.flights.fail(error)

    def lost(self, member: Member) -> None:
        self._dispatch.close_server(member.number)

    def newest(self) -> Weights:
        return self._weights

    async def welcome(self, member: Member, weights: Weights) -> None:
        async with self._control:
            fleet, client = self._usable(), member.client
            if weights != self._weights or not member.is_ours:
                with reading(self._weights.path):
                    await client.pause("retract")
                    await self._load_into(client, self._weights, flush=True)
                if self._paused is None:
                    await client.resume()
            if self._paused is not None:
                await client.pause(_wire(self._paused))
            if self._is_released:
                await self._release(client)
            self._dispatch.open_server(member.number)
            fleet.serve(member)

    async def _look_after(self) -> None:
        """A server that runs and generates nothing is lost like one that has ended."""
        while True:
            await asyncio.sleep(self._health_every_s)
            with suppress(EngineError):  # everybody is told of a failure
                await self._lose_silent(self._usable())

    async def _lose_silent(self, fleet: Fleet) -> None:
        for member in await self._silent(fleet):
            await fleet.lose(member, f"{member.name} answers and generates nothing, or does not answer")

    async def _silent(self, fleet: Fleet) -> list[Member]:
        """Those that generated nothing in two looks, while nobody had told them anything else."""
        suspects = fleet.serving()
        for _ in range(2):
            if self._paused is not None or self._control.locked():
                return []
            num_orders = fleet.num_orders
            generates = await asyncio.gather(*(member.generates(self._health_timeout_s) for member in suspects))
            if fleet.num_orders != num_orders or self._control.locked():
                return []
            suspects = [member for member, one in zip(suspects, generates, strict=True) if not one]
        return suspects

    def _check_memory(self, call: str) -> None:
        if self._is_released:
            raise ValueError(f"{call}: the engine's memory is released; it needs resume_memory first")

    def _check_weights(self, path: Path) -> None:
        try:
            problem = misfit(read_shapes(path), self._held, self._is_tied)
        except ValueError as error:
            raise EngineError(f"weights: {error}; nothing was replaced") from error
        if problem:
            raise EngineError(f"weights: {path} is not the model that was started, nothing was replaced: {problem}")

    async def _pause(self, mode: PauseMode) -> None:
        """ABORT ends the requests while the servers still run, for a paused one ends nothing; what it pauses then is
        idle, and `retract` lets its cache be flushed whatever a health check may be doing."""
        fleet = self._usable()
        self._dispatch.flights.close_gate()
        if mode is self._paused:
            return
        if mode is PauseMode.ABORT:
            if self._paused is not None:
                await fleet.order(lambda client: client.resume())
            sent = self._dispatch.flights.abort(None)
            await self._dispatch.end(sent)
            await self._dispatch.drain(sent)
        await fleet.order(lambda client: client.pause(_wire(mode)))
        self._paused = mode

    async def _resume(self) -> None:
        if self._paused is None:
            return
        await self._usable().order(lambda client: client.resume())
        self._paused = None
        self._dispatch.flights.open_gate()
        late = self._dispatch.flights.aborted()
        await self._dispatch.end(late)
        await self._dispatch.drain(late)

    async def _load(self, weights: Weights) -> None:
        """A cache that running requests still use cannot be flushed."""
        flush = self._paused is not PauseMode.KEEP
        await self._usable().order(lambda client: self._load_into(client, weights, flush=flush))

    async def _load_into(self, client: SGLangClient, weights: Weights, *, flush: bool) -> None:
        await client.update_weights(*weights, flush_cache=flush, timeout_s=self._load_timeout_s)

    async def _release(self, client: SGLangClient) -> None:
        await client.release_memory(self.capabilities.parked)

    def _loaded(self, weights: Weights) -> None:
        self._weights = weights
        was_ahead = self._paused is PauseMode.KEEP and self.capabilities.steps_ahead
        self._dispatch.loaded(*weights, was_ahead)

    def _usable(self) -> Fleet:
        if self._fleet is None:
            raise EngineError("SGLangEngine: not started")
        self._fleet.check()
        return self._fleet

    def _reset(self) -> None:
        self._fleet = None
        self._paused = None
        self._is_released = False
        self._weights = _NOWHERE
        self._capabilities = None
        self._held = {}
        self._is_tied = False
        self._health = None


def _wire(mode: PauseMode) -> str:
    """The server's word for it."""
    return "in_place" if mode is PauseMode.KEEP else "retract"


def _capabilities(infos: Sequence[ServerInfo], experts: tuple[int, int] | None) -> SGLangCapabilities:
    """What all of the servers can do. ValueError if they do not return experts that are wanted."""
    if experts is not None and not all(info.enable_return_routed_experts for info in infos):
        raise ValueError(f"routed_experts: the servers were started without {_RETURN_EXPERTS}")
    has_backup = all(info.enable_weights_cpu_backup for info in infos)
    return SGLangCapabilities(
        max_model_tokens=min(info.max_req_input_len for info in infos),
        takes_seeds=all(info.enable_deterministic_inference for info in infos),
        steps_ahead=not all(info.disable_overlap_schedule for info in infos),
        parked=("kv_cache", "weights") if has_backup else ("kv_cache",),
        releases_memory=all(info.enable_memory_saver and info.device != "cpu" for info in infos),
        routed_experts=experts,
    )
