"""`EmbeddedEngine`: the core behind the `Engine` protocol.

A thread of its own steps the core, so that the asyncio loop stays free while a large model computes; torch lets go of
the interpreter inside its kernels. The loop's side owns futures and checks; the thread owns the core. Orders go one way
through a queue, and everything a step finished comes back in one call.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl.rollout.embedded.core import EmbeddedCore, Finished
from flowrl.rollout.engine import (
    Capabilities,
    EngineError,
    Fill,
    GenerateRequest,
    Generation,
    PauseMode,
    check_lendable,
)

Action = Callable[[], None]


class _Order(NamedTuple):
    """What the thread does between two steps. `done` is told of the end, or of the error; without it an error is the
    engine's own."""

    action: Action
    done: asyncio.Future[None] | None


class EmbeddedEngine:
    """`dtype`: a torch dtype's name. `max_batch`: requests that decode at once; more wait. `max_model_tokens`: prompt
    and response together, the model's own bound if None. `prefill_tokens`: prompt tokens a step. `threads`: of torch,
    for the whole process, unchanged if None."""

    def __init__(
        self,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        max_batch: int = 256,
        max_model_tokens: int | None = None,
        prefill_tokens: int = 1024,
        threads: int | None = None,
    ) -> None:
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype: {dtype!r}; must name a torch dtype, as 'float32' or 'bfloat16'")
        if max_batch < 1 or prefill_tokens < 1:
            raise ValueError(f"max_batch, prefill_tokens: {max_batch}, {prefill_tokens}; must be at least 1")
        self._device = device
        self._dtype = dtype
        self._max_batch = max_batch
        self._max_model_tokens = max_model_tokens
        self._prefill_tokens = prefill_tokens
        self._threads = threads
        self._core: EmbeddedCore | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._orders: queue.SimpleQueue[_Order | None] = queue.SimpleQueue()
        self._pause: PauseMode | None = None
        self._is_released = False
        self._futures: dict[str, asyncio.Future[Generation]] = {}
        self._arrivals: list[GenerateRequest] = []
        self._failure: str | None = "embedded engine: not started"

    @property
    def version(self) -> int:
        return self._core.version if self._core else -1

    @property
    def capabilities(self) -> Capabilities:
        """Known before `start` only where `max_model_tokens` was given."""
        bound = self._core.max_model_tokens if self._core else self._max_model_tokens
        if bound is None:
            raise EngineError("embedded engine: max_model_tokens is the model's own, known once started")
        return Capabilities(max_model_tokens=bound, releases_memory=True)

    async def start(self, path: Path, version: int) -> None:
        assert self._thread is None, "the engine is started"
        self._loop = asyncio.get_running_loop()
        self._orders = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="embedded-engine", daemon=True)
        self._thread.start()
        self._failure = self._pause = None
        self._is_released = False
        try:
            await self._order(lambda: self._load_core(path, version))
        except BaseException:
            await self.close()
            raise

    async def generate(self, request: GenerateRequest) -> Generation:
        core, loop = self._running()
        core.check(request)
        if request.request_id in self._futures:
            raise ValueError(f"request_id: {request.request_id!r} is running; it must be unique among running requests")
        future = self._futures[request.request_id] = loop.create_future()
        if not self._arrivals:
            loop.call_soon(self._submit_arrivals)
        self._arrivals.append(request)
        try:
            return await future
        except asyncio.CancelledError:
            self._submit_arrivals()
            self._orders.put(_Order(lambda: self._deliver(core.abort(request.request_id)), None))
            raise

    async def abort(self, request_id: str | None = None) -> None:
        core, _ = self._running()
        self._submit_arrivals()
        await self._order(lambda: self._deliver(core.abort(request_id)))

    async def pause(self, mode: PauseMode) -> None:
        """Returns when no step runs. A second pause may ask for more than the first, not for less."""
        self._running()
        self._submit_arrivals()
        await self._order(lambda: self._enter_pause(mode))

    async def resume(self) -> None:
        self._running()
        await self._order(self._leave_pause)

    async def load_weights(self, path: Path | Fill, version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        """Weights that do not fit the model are refused, and the engine goes on with those it has. See
        `FillableEngine` for a function in place of a directory."""
        await self._load(path, version, mode)

    async def load_state(self, state: Mapping[str, Tensor], version: int, mode: PauseMode = PauseMode.KEEP) -> None:
        """As `load_weights`, from tensors of this process, named as in the model's state. Copied before it returns."""
        await self._load(state, version, mode)

    async def release_memory(self) -> None:
        self._running()
        self._submit_arrivals()
        await self._order(self._release)

    async def resume_memory(self) -> None:
        core, _ = self._running()

        def resume() -> None:
            core.resume_memory()
            self._is_released = False

        await self._order(resume)

    async def close(self) -> None:
        """Ends the thread; requests that still run fail. May be called again."""
        self._fail("embedded engine: closed")
        if self._thread is not None and self._loop is not None:
            self._orders.put(None)
            await self._loop.run_in_executor(None, self._thread.join)
            self._thread = None
            self._core = None

    async def _load(self, source: Path | Fill | Mapping[str, Tensor], version: int, mode: PauseMode) -> None:
        core, _ = self._running()
        self._submit_arrivals()

        def load() -> None:
            self._check_memory("load_weights")
            self._deliver(core.load(source, version, mode))

        await self._order(load)

    # On the loop.

    def _running(self) -> tuple[EmbeddedCore, asyncio.AbstractEventLoop]:
        if self._failure is not None:
            raise EngineError(self._failure)
        assert self._core is not None and self._loop is not None, "start has not returned"
        return self._core, self._loop

    def _submit_arrivals(self) -> None:
        """Requests made in one turn of the loop reach the core together, so that equal prompts meet."""
        if self._arrivals and self._core is not None:
            arrivals, core, self._arrivals = self._arrivals, self._core, []
            self._orders.put(_Order(lambda: core.submit(arrivals), None))

    async def _order(self, action: Action) -> None:
        """Has the thread do `action` between two steps; its error comes back."""
        done = asyncio.get_running_loop().create_future()
        self._orders.put(_Order(action, done))
        await done

    def _resolve(self, finished: list[Finished]) -> None:
        for request_id, generation in finished:
            future = self._futures.pop(request_id, None)
            if future is not None and not future.done():
                future.set_result(generation)

    def _fail(self, failure: str, cause: Exception | None = None) -> None:
        """Nothing more will come: every waiting request ends with an EngineError."""
        self._failure = failure
        self._arrivals = []
        futures, self._futures = self._futures, {}
        for future in futures.values():
            if not future.done():
                error = EngineError(failure)
                error.__cause__ = cause
                future.set_exception(error)

    # On the thread.

    def _serve(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        try:
            while self._obey():
                if self._core is not None and self._pause is None and self._core.has_work:
                    self._deliver(self._core.step())
        except Exception as error:
            failure = f"embedded engine: failed in a step, restart it: {type(error).__name__}: {error}"
            self._call_loop(partial(self._fail, failure, error))
            while (order := self._orders.get()) is not None:
                if order.done is not None:
                    self._call_loop(partial(_settle, order.done, EngineError(failure)))

    def _obey(self) -> bool:
        """Carries out what was ordered, waiting for an order if there is nothing to step; False at the end."""
        is_idle = self._core is None or self._pause is not None or not self._core.has_work
        while True:
            try:
                order = self._orders.get(block=is_idle)
            except queue.Empty:
                return True
            if order is None:
                return False
            self._carry_out(order)
            is_idle = False

    def _carry_out(self, order: _Order) -> None:
        if order.done is None:
            order.action()
            return
        try:
            order.action()
        except Exception as error:
            self._call_loop(partial(_settle, order.done, error))
        else:
            self._call_loop(partial(_settle, order.done, None))

    def _load_core(self, path: Path, version: int) -> None:
        self._core = EmbeddedCore(
            path,
            version,
            device=self._device,
            dtype=self._dtype,
            max_batch=self._max_batch,
            max_model_tokens=self._max_model_tokens,
            prefill_tokens=self._prefill_tokens,
        )

    def _enter_pause(self, mode: PauseMode) -> None:
        assert self._core is not None
        self._check_memory("pause")
        if mode is PauseMode.ABORT:
            self._deliver(self._core.abort())
        if self._pause is not PauseMode.RECOMPUTE:
            self._pause = mode

    def _leave_pause(self) -> None:
        assert self._core is not None
        self._check_memory("resume")
        if self._pause is PauseMode.RECOMPUTE:
            self._core.recompute()
        self._pause = None

    def _release(self) -> None:
        assert self._core is not None
        check_lendable(self._pause)
        if not self._is_released:
            self._core.release_memory()
            self._is_released = True

    def _check_memory(self, call: str) -> None:
        if self._is_released:
            raise ValueError(f"{call}: the engine's memory is released; it needs resume_memory first")

    def _deliver(self, finished: list[Finished]) -> None:
        if finished:
            self._call_loop(partial(self._resolve, finished))

    def _call_loop(self, action: Action) -> None:
        assert self._loop is not None
        if self._loop.is_closed():
            self._orders.put(None)  # Nobody is left to hear of anything: the thread ends.
        else:
            self._loop.call_soon_threadsafe(action)


def _settle(done: asyncio.Future[None], error: Exception | None) -> None:
    if done.cancelled():
        return
    if error is None:
        done.set_result(None)
    else:
        done.set_exception(error)
