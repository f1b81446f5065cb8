"""The worker's end of the control channel: one thread that owns one DEALER socket.

Everything the worker says, and every callback, passes through this thread, in order. An exception in a callback ends
the worker: a worker that no longer hears its controller must not go on. The controller's end is in `node.py`.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

import zmq

from controllers.mailbox import Mailbox
from controllers.messages import (
    Announcement,
    Failed,
    Finished,
    Goodbye,
    Heartbeat,
    Hello,
    Reply,
    Request,
    ToController,
    ToWorker,
    Welcome,
    decode_to_worker,
    encode,
)

HEARTBEAT_S = 1.0
_WELCOME_TIMEOUT_S = 30.0
_GOODBYE_TIMEOUT_S = 5.0
_LINGER_MS = 2000

Callback = Callable[[dict[str, Any]], object]


class ControlChannel:
    """Start it, use it from any thread, close it. `stopping` is set when the controller, or a signal, says so."""

    def __init__(self, endpoint: str, identity: str) -> None:
        self.stopping = threading.Event()
        self._endpoint = endpoint
        self._identity = identity
        self._mailbox = Mailbox()
        self._is_closing = False
        self._goodbye = threading.Event()
        self._welcomed = threading.Event()
        self._retained: dict[str, Announcement] = {}
        self._callbacks: dict[str, list[Callback]] = {}
        self._stop_callbacks: list[Callable[[], None]] = []
        self._replies: dict[int, SimpleQueue[Reply]] = {}
        self._numbers = itertools.count()
        self._waits: dict[object, tuple[str, float]] = {}
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Returns when the controller has said welcome."""
        self._thread.start()
        if not self._welcomed.wait(_WELCOME_TIMEOUT_S):
            raise TimeoutError(f"the controller at {self._endpoint} did not answer within {_WELCOME_TIMEOUT_S:.0f} s")

    def close(self, last_word: Finished | Failed) -> None:
        """Sends what is left, waits until the controller has heard it, then ends the thread."""
        self.send(last_word)
        self._goodbye.wait(_GOODBYE_TIMEOUT_S)
        self._mailbox.post(self._set_closing)
        self._thread.join()

    def send(self, message: ToController) -> None:
        self._mailbox.post(lambda: self._send(message))

    def ask(self, method: str, argument: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """Raises TimeoutError, or RuntimeError with the controller's reason."""
        assert threading.current_thread() is not self._thread, "a callback of the control thread cannot wait for it"
        number = next(self._numbers)
        answer: SimpleQueue[Reply] = SimpleQueue()
        self._replies[number] = answer
        self.send(Request(number, method, argument))
        try:
            with self.waiting_for(f"the controller's answer to {method!r}"):
                reply = answer.get(timeout=timeout_s)
        except Empty:
            raise TimeoutError(f"{method}: the controller did not answer within {timeout_s:.0f} s") from None
        finally:
            del self._replies[number]
        if reply.error:
            raise RuntimeError(f"{method}: {reply.error}")
        return reply.result

    def on(self, topic: str, callback: Callback) -> None:
        def register() -> None:
            self._callbacks.setdefault(topic, []).append(callback)
            if topic in self._retained:
                callback(self._retained[topic].payload)

        self._mailbox.post(register)

    def on_stop(self, callback: Callable[[], None]) -> None:
        def register() -> None:
            self._stop_callbacks.append(callback)
            if self.stopping.is_set():
                callback()

        self._mailbox.post(register)

    def signal_stop(self) -> None:
        """For a signal handler: takes no lock."""
        self._mailbox.post(self._stop)

    @contextmanager
    def waiting_for(self, what: str) -> Iterator[None]:
        token = object()
        self._waits[token] = (what, time.monotonic())
        try:
            yield
        finally:
            del self._waits[token]

    def waits(self) -> list[tuple[str, float]]:
        """What this worker waits for now, each with the seconds so far. For a signal handler: takes no lock."""
        now = time.monotonic()
        return [(what, now - since) for what, since in list(self._waits.values())]

    def _run(self) -> None:
        context = zmq.Context()
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, self._identity.encode())
        self._socket.setsockopt(zmq.LINGER, _LINGER_MS)
        self._socket.connect(self._endpoint)
        try:
            self._loop()
        except Exception as error:
            traceback.print_exc()
            self._send(Failed(f"in the control thread: {error!r}", traceback.format_exc()))
            self._socket.close()
            context.term()
            os._exit(1)
        self._socket.close()
        context.term()

    def _loop(self) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._mailbox.fd, zmq.POLLIN)
        self._send(Hello())
        next_beat = time.monotonic()
        while not self._is_closing:
            now = time.monotonic()
            if now >= next_beat:
                self._send(self._heartbeat(now))
                next_beat = now + HEARTBEAT_S
            ready = dict(poller.poll(math.ceil(max(0.0, next_beat - now) * 1000)))
            if self._mailbox.fd in ready:
                self._mailbox.run()
            if self._socket in ready:
                self._hear(decode_to_worker(self._socket.recv()))

    def _hear(self, message: ToWorker) -> None:
        if isinstance(message, Welcome):
            self._retained = {retained.topic: retained for retained in message.retained}
            for retained in message.retained:
                self._call(retained)
            self._welcomed.set()
        elif isinstance(message, Announcement):
            self._retained[message.topic] = message
            self._call(message)
        elif isinstance(message, Reply):
            answer = self._replies.get(message.number)
            if answer is not None:  # None: the asker has given up waiting
                answer.put(message)
        elif isinstance(message, Goodbye):
            self._goodbye.set()
        else:
            self._stop()

    def _call(self, announcement: Announcement) -> None:
        for callback in self._callbacks.get(announcement.topic, ()):
            callback(announcement.payload)

    def _stop(self) -> None:
        if not self.stopping.is_set():
            self.stopping.set()
            for callback in self._stop_callbacks:
                callback()

    def _heartbeat(self, now: float) -> Heartbeat:
        waits = list(self._waits.values())
        if not waits:
            return Heartbeat("", 0.0)
        what, since = min(waits, key=lambda wait: wait[1])
        return Heartbeat(what, now - since)

    def _set_closing(self) -> None:
        self._is_closing = True

    def _send(self, message: ToController) -> None:
        self._socket.send(encode(message))
