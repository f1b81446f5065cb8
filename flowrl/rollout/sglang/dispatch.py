"""Requests on their way: through the gate, to a server, back as generations. What servers hold is `engine.py`'s.

A request whose server is lost goes to another, from its beginning: what the lost one had written came without versions.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from flowrl.rollout.engine import EngineError, GenerateRequest, Generation
from flowrl.rollout.scheduling.routing import Router
from flowrl.rollout.sglang.answers import (
    STREAM_INTERVAL,
    Parts,
    cut_at_stop,
    generate_body,
    generation,
    nothing_generated,
)
from flowrl.rollout.sglang.client import GenerateBody, GenerateMeta, ServerGone, SGLangClient
from flowrl.rollout.sglang.fleet import Fleet
from flowrl.rollout.sglang.flights import Admission, Flight, Flights, all_ended
from flowrl.rollout.stop_strings import Decode, ends_in_stop, load_decode

_ABORT_AGAIN_S = 0.25
_DROP_AFTER_S = 10.0
_MAX_LOSSES = 3


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask of the model. routed_experts: as in the capabilities."""

    max_model_tokens: int
    vocab_size: int
    routed_experts: tuple[int, int] | None


class Dispatch:
    """`flights` has the gate. Used from one asyncio loop."""

    def __init__(self, fleet: Fleet, num_servers: int) -> None:
        self._fleet = fleet
        self._router = Router(num_servers)
        self._replaced_ahead: set[int] = set()
        self._num_loads = 0
        self._version = -1
        self._path = Path()
        self._decode: Decode | None = None
        self.flights = Flights()
        self.limits: Limits | None = None

    def loaded(self, path: Path, version: int, was_ahead: bool) -> None:
        """Servers have these weights now. After a rollback a version comes again, with other weights: the key for
        cached prefixes tells them apart. was_ahead: running requests went on, with a step that old weights prepared."""
        self._path, self._version = path, version
        self._num_loads += 1
        self._router.forget()
        (self._replaced_ahead.add if was_ahead else self._replaced_ahead.discard)(version)

    def close_server(self, number: int) -> None:
        self._router.close(number)

    def open_server(self, number: int) -> None:
        self._router.open(number)

    async def generate(self, request: GenerateRequest) -> Generation:
        self._check(request)
        flight = self.flights.enter(request.request_id)
        try:
            for _ in range(_MAX_LOSSES):
                if await flight.admission is Admission.ABORTED:
                    return nothing_generated()
                try:
                    return await self._send(request, flight)
                except ServerGone:
                    self._fleet.check()
                    self.flights.reenter(flight)
            raise EngineError(f"SGLangEngine: request {request.request_id!r} has lost {_MAX_LOSSES} servers")
        finally:
            self.flights.leave(flight)

    async def end(self, flights: list[Flight]) -> None:
        """Asks servers to end them."""
        if not flights:
            return
        if self.flights.are_all_aborted():
            return await self._fleet.ask(lambda client: client.abort_all())

        async def end(flight: Flight) -> None:
            await self._fleet.ask(lambda client: client.abort(flight.rid))

        await asyncio.gather(*(end(flight) for flight in flights))

    async def drain(self, flights: list[Flight]) -> None:
        """Waits until running servers have ended what they were asked to end. A server loses the question for a request
        on its way to its scheduler, and hears none but `abort_all` a second time; so answers that do not come are
        waited for no longer, which the server notices and ends the request by itself."""
        deadline = time.monotonic() + _DROP_AFTER_S
        while not await all_ended(flights, _ABORT_AGAIN_S):
            flights = [flight for flight in flights if not flight.ended.is_set()]
            if time.monotonic() > deadline:
                for flight in flights:
                    flight.drop()
            await self.end(flights)

    async def _send(self, request: GenerateRequest, flight: Flight) -> Generation:
        assert self.limits is not None, "the servers have not said what they hold"
        number = self._router.choose(request.tokens)
        member = self._fleet.member(number)
        client, sent_under = member.client, self._version
        experts = self.limits.routed_experts
        body = generate_body(request, flight.rid, f"{self._version}.{self._num_loads}", experts is not None)
        flight.call = asyncio.create_task(self._call(client, body, request.sampling.stop_strings))
        try:
            answer = await flight.call
        except ServerGone as error:
            await self._fleet.lose(member, str(error), broke_off=True)
            raise
        except asyncio.CancelledError:
            if flight.is_dropped:
                return nothing_generated()
            # Nobody waits for it any more; a server that is gone has nothing left to abort.
            with suppress(EngineError):
                await client.abort(flight.rid)
            raise
        finally:
            self._router.leave(number)
        try:
            made = generation(answer, sent_under, self._replaced_ahead, experts)
        except ValueError as error:
            raise EngineError(f"{client.name} answered request {request.request_id!r} with {error}") from error
        stops = request.sampling.stop_strings
        return cut_at_stop(made, stops, self._read()) if stops else made

    async def _call(self, client: SGLangClient, body: GenerateBody, stops: tuple[str, ...]) -> GenerateMeta:
        """A response with stop strings is read as it is written, and ended when it has one."""
        if not stops:
            return (await client.generate(body)).meta_info
        parts, decode, has_stopped = Parts(), self._read(), False
        last = GenerateMeta(None)
        async for last in client.stream(body):
            num_new = max(parts.add(last), STREAM_INTERVAL)
            if not has_stopped and ends_in_stop(parts.tokens, stops, decode, num_new):
                has_stopped = True
                await client.abort(body.rid)
        return parts.whole(last)

    def _check(self, request: GenerateRequest) -> None:
        """What a server does not refuse: a token beyond the vocabulary ends it, and a response too long is cut."""
        assert self.limits is not None, "the servers have not said what they hold"
        longest, num_ids = self.limits.max_model_tokens, self.limits.vocab_size
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
