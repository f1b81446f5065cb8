"""`kill -USR1 PID`: a process writes every thread's stack, and what it waits for, to where its errors go.

The stacks come from C, at once, even if no Python code gets a turn; the words come when the main thread has one.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType


def show_on_signal(describe: Callable[[], Sequence[str]]) -> None:
    """`describe()` gives the lines that follow the stacks; it is called in a signal handler, so it must take no lock.
    In the main thread only; a second call replaces the first."""

    def show(_signum: int, _frame: FrameType | None) -> None:
        head = f"process {os.getpid()} at {time.strftime('%H:%M:%S')}"
        text = "".join(f"  {line}\n" for line in describe())
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"{head}\n{text}".encode())

    faulthandler.unregister(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, show)
    faulthandler.register(signal.SIGUSR1, all_threads=True, chain=True)
