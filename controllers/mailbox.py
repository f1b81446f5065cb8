"""A way for other threads, and for signal handlers, to have something done in an event loop's own thread."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable


class Mailbox:
    """`fd` is readable while there is something to `run`. `post` takes no lock: a signal handler may call it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._actions: deque[Callable[[], None]] = deque()

    def post(self, action: Callable[[], None]) -> None:
        self._actions.append(action)
        os.eventfd_write(self.fd, 1)

    def run(self) -> None:
        """Call it when `fd` is readable."""
        os.eventfd_read(self.fd)
        while self._actions:
            self._actions.popleft()()
