"""SGLangEngine: the `Engine` protocol over SGLang servers, launched here or already running. See docs/sglang.md.

It owns the order of the calls: what happens to requests while weights change, and which version a token is given. The
servers are `fleet.py`'s, the HTTP `client.py`'s, the gate `flights.py`'s.

    closed -> ready -> paused -> ready     ready, paused -> failed     any -> closed
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl.rollout.engine import Capabilities, EngineError, GenerateRequest, Generation, PauseMode, check_lendable
from flowrl.rollout.scheduling.routing import Router
from flowrl.rollout.sglang.answers import cut_at_stop, generate_body, generation, nothing_generated
from flowrl.rollout.sglang.arguments import ServerSettings
from flowrl.rollout.sglang.checkpoint import Shapes, misfit, read_config, read_shapes, vocab_size
from flowrl.rollout.sglang.client import ServerInfo
from flowrl.rollout.sglang.fleet import Fleet
from flowrl.rollout.sglang.flights import Admission, Flight, Flights, all_ended
from flowrl.rollout.stop_strings import Decode, load_decode

_ABORT_AGAIN_S = 0.25
_DROP_AFTER_S = 10.0
_HEALTH_TIMEOUT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class SGLangCapabilities(Capabilities):
    """takes_seeds: whether `SamplingParams.seed` has an effect. Only a server in its deterministic mode heeds it.
    steps_ahead: the server prepares decode steps ahead, see `versions.py`. parked: what `release_memory` frees."""

    takes_seeds: bool
    steps_ahead: bool
    vocab_size: int
    parked: tuple[str, ...]


class SGLangEngine:
    """With `urls` the engine uses servers that run already (they hold the weights of this engine alone and see its file
    system); otherwise `start` launches `servers` of them. Each request goes to the least loaded, or to the one that has
    its prompt. The other arguments are those of `ServerSettings`."""

    _fleet: Fleet | None
    _flights: Flights
    _paused: PauseMode | None
    _is_released: bool
    _capabilities: SGLangCapabilities | None
    _replaced_ahead: set[int]
    _held: Shapes
    _is_tied: bool
    _router: Router
    _path: Path
    _decode: Decode | None

    def __init__(
        self,
        *,
        python: str = sys.executable,
        device: str = "cuda",
        host: str = "127.0.0.1",
        port: int = 0,
        server_args: Mapping[str, Any] | None = None,
        env: Mapping[str, str] | None = None,
        log_path: Path = Path("sglang.log"),
        startup_timeout_s: float = 600.0,
        load_timeout_s: float = 600.0,
        urls: Sequence[str] = (),
        servers: int = 1,
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
                server_args=server_args or {},
                env=env or {},
                log_path=log,
                startup_timeout_s=startup_timeout_s,
            )
            for log in logs
        ]
        self._load_timeout_s = load_timeout_s
        self._urls = tuple(urls)
        self._control = asyncio.Lock()
        self._num_loads = 0
        self._reset()

    @property
    def version(self) -> int:
        return self._version

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
        self._path, self._decode = path, None
        self._is_tied = bool(config.get("tie_word_embeddings", False))
        self._fleet = fleet = Fleet(on_failure=self._flights.fail)
        try:
            if self._urls:
                fleet.connect(self._urls)
                await self._pause(PauseMode.RECOMPUTE)
                await self._load(path, version)
                await self._resume()
            else:
                await fleet.launch(self._settings, path, version)
            self._router = Router(len(fleet.clients()))
            infos = await fleet.infos()
        except BaseException:
            await self.close()
            raise
        self._capabilities = SGLangCapabilities(
            max_model_tokens=min(info.max_req_input_len for info in infos),
            takes_seeds=all(info.enable_deterministic_inference for info in infos),
            steps_ahead=not all(info.disable_overlap_schedule for info in infos),
            vocab_size=vocab_size(config),
            parked=_parked(infos),
            releases_memory=all(info.enable_memory_saver and info.device != "cpu" for info in infos),
        )
        self._set_version(version)

    async def restart(self, path: Path, version: int) -> None:
        """Ends what runs and starts anew, after a failure for instance. Requests underway raise EngineError."""
        await self.close()
        await self.start(path, version)

    async def close(self) -> None:
        """Requests underway raise EngineError. Servers that were launched here are gone when it returns."""
        fleet = self._fleet
        if fleet is not None:
            await fleet.close()
        self._reset()

    async def generate(self, request: GenerateRequest) -> Generation:
        self._usable()
        self._check_request(request)
        flights = self._flights
        flight = flights.enter(request.request_id)
        try:
            if await flight.admission is Admission.ABORTED:
                return nothing_generated()
            return await self._send(request, flight)
        finally:
            flights.leave(flight)

    async def abort(self, request_id: str | None = None) -> None:
        """Returns when they have ended; those that a pause holds may do so only when it is over."""
        self._usable()
        sent = self._flights.abort(request_id)
        await self._ask_to_end(sent)
        if self._paused is None:
            await self._drain(sent)

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
        before anything changes; after any other error the engine must be restarted: mixed weights never serve."""
        async with self._control:
            self._usable()
            self._check_memory("load_weights")
            await asyncio.to_thread(self._check_weights, path)
            was_paused = self._paused is not None
            if not was_paused:
                await self._pause(mode)
            await self._load(path, version)
            self._set_version(version)
            if not was_paused:
                await self._resume()

    async def release_memory(self) -> None:
        """The KV cache's, and the weights' of servers started with `enable_weights_cpu_backup`. Frees nothing without
        `enable_memory_saver`, nor on a CPU."""
        async with self._control:
            fleet = self._usable()
            check_lendable(self._paused)
            if not self._is_released:
                tags = self.capabilities.parked
                await fleet.order(lambda client: client.release_memory(tags))
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
        for client in self._usable().clients():
            if self._paused is None and await client.generates(_HEALTH_TIMEOUT_S):
                continue
            if self._paused is None:
                raise EngineError(f"{client.name} answers and generates nothing")
            await client.model_info()

    def _check_memory(self, call: str) -> None:
        if self._is_released:
            raise ValueError(f"{call}: the engine's memory is released; it needs resume_memory first")

    def _check_request(self, request: GenerateRequest) -> None:
        """What a server does not refuse: a token beyond the vocabulary ends it, and a response too long is cut."""
        longest, num_ids = self.capabilities.max_model_tokens, self.capabilities.vocab_size
        wanted = len(request.tokens) + request.sampling.max_tokens
        if not request.tokens:
            raise ValueError(f"tokens: none in request {request.request_id!r}; a prompt has at least one")
        if min(request.tokens) < 0 or max(request.tokens) >= num_ids:
            raise ValueError(f"tokens: {request.tokens}; each must be in [0, {num_ids}), the model's vocabulary")
        if request.sampling.repetition_penalty != 1:
            raise ValueError(
                f"repetition_penalty: {request.sampling.repetition_penalty}; must be 1 with SGLang, whose log-probs "
                "are then not those of the distribution it samples from"
            )
        if request.sampling.stop_strings:
            self._read()
        if wanted > longest:
            raise ValueError(f"max_tokens: {wanted} with the prompt; the engine holds {longest} tokens a request")

    def _read(self) -> Decode:
        """ValueError if the model came without a tokenizer."""
        if self._decode is None:
            self._decode = load_decode(self._path)
        return self._decode

    def _check_weights(self, path: Path) -> None:
        try:
            problem = misfit(read_shapes(path), self._held, self._is_tied)
        except ValueError as error:
            raise EngineError(f"weights: {error}; nothing was replaced") from error
        if problem:
            raise EngineError(f"weights: {path} is not the model that was started, nothing was replaced: {problem}")

    async def _send(self, request: GenerateRequest, flight: Flight) -> Generation:
        fleet = self._usable()
        server = self._router.choose(request.tokens)
        client = fleet.clients()[server]
        sent_under = self._version
        body = generate_body(request, flight.rid, self._extra_key)
        flight.call = asyncio.create_task(client.generate(body))
        try:
            answer = await flight.call
        except EngineError:
            fleet.check()  # why its calls broke off, if that is known
            raise
        except asyncio.CancelledError:
            if flight.is_dropped:
                return nothing_generated()
            # Nobody waits for it any more; a server that is gone has nothing left to abort.
            with suppress(EngineError):
                await client.abort(flight.rid)
            raise
        finally:
            self._router.leave(server)
        try:
            made = generation(answer, sent_under, self._replaced_ahead)
        except ValueError as error:
            raise EngineError(f"{client.name} answered request {request.request_id!r} with {error}") from error
        stops = request.sampling.stop_strings
        return cut_at_stop(made, stops, self._read()) if stops else made

    async def _drain(self, flights: list[Flight]) -> None:
        """Waits until running servers have ended what they were asked to end. A server loses the question for a request
        on its way to its scheduler, and hears none but `abort_all` a second time; so answers that do not come are
        waited for no longer, which the server notices and ends the request by itself."""
        deadline = time.monotonic() + _DROP_AFTER_S
        while not await all_ended(flights, _ABORT_AGAIN_S):
            flights = [flight for flight in flights if not flight.ended.is_set()]
            if time.monotonic() > deadline:
                for flight in flights:
                    flight.drop()
            await self._ask_to_end(flights)

    async def _ask_to_end(self, flights: list[Flight]) -> None:
        fleet = self._usable()
        if not flights:
            return
        if self._flights.are_all_aborted():
            return await fleet.ask(lambda client: client.abort_all())

        async def end(flight: Flight) -> None:
            await fleet.ask(lambda client: client.abort(flight.rid))

        await asyncio.gather(*(end(flight) for flight in flights))

    async def _pause(self, mode: PauseMode) -> None:
        """ABORT ends the requests while the servers still run, for a paused one ends nothing; what it pauses then is
        idle, and `retract` lets its cache be flushed whatever a health check may be doing."""
        fleet = self._usable()
        self._flights.close_gate()
        if mode is self._paused:
            return
        if mode is PauseMode.ABORT:
            if self._paused is not None:
                await fleet.order(lambda client: client.resume())
            sent = self._flights.abort(None)
            await self._ask_to_end(sent)
            await self._drain(sent)
        await fleet.order(lambda client: client.pause("in_place" if mode is PauseMode.KEEP else "retract"))
        self._paused = mode

    async def _resume(self) -> None:
        if self._paused is None:
            return
        await self._usable().order(lambda client: client.resume())
        self._paused = None
        self._flights.open_gate()
        late = self._flights.aborted()
        await self._ask_to_end(late)
        await self._drain(late)

    async def _load(self, path: Path, version: int) -> None:
        """A cache that running requests still use cannot be flushed."""
        flush, timeout_s = self._paused is not PauseMode.KEEP, self._load_timeout_s
        await self._usable().order(
            lambda client: client.update_weights(path, version, flush_cache=flush, timeout_s=timeout_s)
        )

    def _set_version(self, version: int) -> None:
        """After a rollback a version comes again, with other weights: the key for cached prefixes tells them apart."""
        self._version = version
        self._num_loads += 1
        self._extra_key = f"{version}.{self._num_loads}"
        if self._paused is PauseMode.KEEP and self.capabilities.steps_ahead:
            self._replaced_ahead.add(version)
        else:
            self._replaced_ahead.discard(version)

    def _usable(self) -> Fleet:
        if self._fleet is None:
            raise EngineError("SGLangEngine: not started")
        self._fleet.check()
        return self._fleet

    def _reset(self) -> None:
        self._fleet = None
        self._flights = Flights()
        self._paused = None
        self._is_released = False
        self._version = -1
        self._extra_key = ""
        self._replaced_ahead = set()
        self._capabilities = None
        self._held = {}
        self._is_tied = False


def _parked(infos: Sequence[ServerInfo]) -> tuple[str, ...]:
    """What servers can give back and have again as it was."""
    has_backup = all(info.enable_weights_cpu_backup for info in infos)
    return ("kv_cache", "weights") if has_backup else ("kv_cache",)
