"""The accounts of several shards, served in a thread."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transfer_queue import Accounts, ClockServer


@contextmanager
def clock_host(endpoint: str, accounts: Accounts) -> Iterator[ClockServer]:
    server = ClockServer(endpoint, accounts)
    thread = threading.Thread(target=server.serve)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()
        server.close()
