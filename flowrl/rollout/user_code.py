"""Calls functions of the user's from the rollout loop so that none holds up another, or the engine.

    ordinary functions    a thread each while they run; threads are kept for the next call
    coroutines            one event loop in a thread of its own, apart from the engine's

A call that takes too long is named and no longer waited for. Its thread cannot be ended: it is given up, and others are
made in its place, up to `MOST_GIVEN_UP`. Where a coroutine blocks its loop, the loop is given up with all that runs in
it, and the next call starts another. Threads are daemons: none keeps the process alive.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any

MOST_GIVEN_UP = 256
PATIENCE_S = 1.0

_Job = tuple[Callable[[], Any], "Future[Any]"]


class CallFailed(Exception):
    """The user's code raised. The message says who and what; the cause is the user's exception."""


class CallTimedOut(Exception):
    """The user's code took longer than it may, or the loop that it shared was blocked. The message says who."""


class UserCode:
    """Used from one asyncio loop. `close` gives up whatever still runs."""

    def __init__(self) -> None:
        self._threads = Threads()
        self._loop: LoopThread | None = None
        self._given_up: list[Future[Any]] = []
        self._last_acts: set[asyncio.Task[None]] = set()

    async def call(self, label: str, function: Callable[..., Any], *arguments: Any, timeout_s: float | None) -> Any:
        """What `function(*arguments)` returns, awaited if it can be. timeout_s: of both together; None: the function
        limits itself. Raises CallFailed or CallTimedOut."""
        deadline = None if timeout_s is None else asyncio.get_running_loop().time() + timeout_s
        if inspect.iscoroutinefunction(function):
            return await self._await(label, function(*arguments), deadline, timeout_s)
        future = self._threads.submit(lambda: function(*arguments))
        result = await self._result(label, future, deadline, timeout_s)
        if inspect.iscoroutine(result):
            return await self._await(label, result, deadline, timeout_s)
        return result

    def afterwards(self, act: Coroutine[Any, Any, None]) -> None:
        """Does what nobody waits for."""
        task = asyncio.get_running_loop().create_task(act)
        self._last_acts.add(task)
        task.add_done_callback(self._last_acts.discard)

    def close(self) -> None:
        for task in self._last_acts:
            task.cancel()
        self._threads.close()
        if self._loop is not None:
            self._loop.give_up("the episodes have ended")

    @property
    def num_given_up(self) -> int:
        """Calls that were given up and still run."""
        self._given_up = [future for future in self._given_up if not future.done()]
        return len(self._given_up)

    async def _await(
        self, label: str, coroutine: Coroutine[Any, Any, Any], deadline: float | None, timeout_s: float | None
    ) -> Any:
        if self._loop is None or self._loop.is_given_up:
            self._loop = LoopThread()
        loop = self._loop
        future = loop.submit(coroutine, label)
        try:
            return await self._result(label, future, deadline, timeout_s)
        except CallTimedOut:
            await self._look_after(loop)
            raise

    async def _result(self, label: str, future: Future[Any], deadline: float | None, timeout_s: float | None) -> Any:
        waited = asyncio.wrap_future(future)
        left_s = None if deadline is None else max(0.0, deadline - asyncio.get_running_loop().time())
        try:
            done, _ = await asyncio.wait([waited], timeout=left_s)
        except asyncio.CancelledError:
            waited.cancel()
            raise
        if done:
            try:
                return waited.result()
            except (CallFailed, CallTimedOut) as error:
                raise type(error)(f"{label}: {error}") from error.__cause__
        waited.cancel()
        future.add_done_callback(_close_coroutine)
        if not future.done():
            self._given_up.append(future)
        if self.num_given_up > MOST_GIVEN_UP:
            raise RuntimeError(f"{label}: {MOST_GIVEN_UP} calls hang in threads that cannot be ended")
        raise CallTimedOut(f"{label}: no answer in {timeout_s} s")

    async def _look_after(self, loop: LoopThread) -> None:
        """Gives the loop up if it does not answer: a coroutine of the user's blocks it."""
        answer = loop.ping()
        for _ in range(20):
            if answer.is_set():
                return
            await asyncio.sleep(PATIENCE_S / 20)
        loop.give_up(f"the loop was blocked by {loop.current()}")


class Threads:
    """As many as there are calls under way; idle ones are used again, the last first."""

    def __init__(self) -> None:
        self._idle: list[queue.SimpleQueue[_Job | None]] = []
        self._is_closed = False

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            jobs = self._idle.pop()
        except IndexError:
            jobs = queue.SimpleQueue()
            threading.Thread(target=self._serve, args=(jobs,), name="user-code", daemon=True).start()
        jobs.put((work, future))
        return future

    def close(self) -> None:
        self._is_closed = True
        while self._idle:
            self._idle.pop().put(None)

    def _serve(self, jobs: queue.SimpleQueue[_Job | None]) -> None:
        while (job := jobs.get()) is not None:
            _carry_out(*job)
            del job  # whatever the user's code returned is not kept alive by an idle thread
            if self._is_closed:
                return
            self._idle.append(jobs)


def _carry_out(work: Callable[[], Any], future: Future[Any]) -> None:
    """Whatever is raised, SystemExit too, ends the call and nothing else."""
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = work()
    except BaseException as error:
        outcome = CallFailed(f"raised {error!r}")
        outcome.__cause__ = error
        future.set_exception(outcome)
    else:
        future.set_result(result)


def _close_coroutine(future: Future[Any]) -> None:
    """What a call gave too late is not awaited any more."""
    if not future.cancelled() and future.exception() is None and inspect.iscoroutine(future.result()):
        future.result().close()


class LoopThread:
    """An event loop in a daemon thread, for coroutines of the user's."""

    def __init__(self) -> None:
        self.is_given_up = False
        self._settling = threading.Lock()
        self._running: set[Future[Any]] = set()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._serve, name="user-code-loop", daemon=True).start()

    def submit(self, coroutine: Coroutine[Any, Any, Any], label: str) -> Future[Any]:
        future: Future[Any] = Future()
        future.add_done_callback(self._running.discard)
        self._running.add(future)
        self._loop.call_soon_threadsafe(self._start, coroutine, label, future)
        return future

    def ping(self) -> threading.Event:
        """Set by the loop's next turn."""
        answer = threading.Event()
        if not self.is_given_up:
            self._loop.call_soon_threadsafe(answer.set)
        return answer

    def current(self) -> str:
        """Whose coroutine runs at this moment."""
        task = asyncio.current_task(self._loop)
        return task.get_name() if task is not None else "nobody that is known"

    def give_up(self, reason: str) -> None:
        """Everything in it fails; the thread ends when, if ever, the loop turns again."""
        if self.is_given_up:
            return
        self.is_given_up = True
        for future in list(self._running):
            self._settle(future, None, CallTimedOut(reason))
        self._loop.call_soon_threadsafe(self._loop.stop)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=PATIENCE_S))
            self._loop.run_until_complete(asyncio.sleep(0))  # for what was submitted and has not begun
        finally:
            self._loop.close()

    def _start(self, coroutine: Coroutine[Any, Any, Any], label: str, future: Future[Any]) -> None:
        if future.done():
            coroutine.close()
            return
        task = self._loop.create_task(_guarded(coroutine), name=label)
        task.add_done_callback(lambda _: coroutine.close())  # one that was cancelled before its first step
        future.add_done_callback(lambda done: self._cancel(task) if done.cancelled() else None)
        task.add_done_callback(lambda done: self._hand_over(done, future))

    def _hand_over(self, task: asyncio.Task[Any], future: Future[Any]) -> None:
        error = CallFailed("was cancelled") if task.cancelled() else task.exception()
        self._settle(future, None if error else task.result(), error)

    def _settle(self, future: Future[Any], result: Any, error: BaseException | None) -> None:
        """Once: a loop that was given up may still come to an end of its own."""
        with self._settling:
            if future.done() or not future.set_running_or_notify_cancel():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

    def _cancel(self, task: asyncio.Task[Any]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(task.cancel)


async def _guarded(coroutine: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await coroutine
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        raise CallFailed(f"raised {error!r}") from error
