"""Where the worlds that workers build can meet: a host and a free port for each name, asked for by all their ranks."""

from __future__ import annotations

import socket
import threading


class Rendezvous:
    """Of the node whose worker is rank 0. Usable from any thread."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._ports: dict[str, int] = {}
        self._lock = threading.Lock()

    def port(self, name: str) -> int:
        """The same for all who ask by one name. The port was free a moment ago; nothing holds it until rank 0 does."""
        with self._lock:
            if name not in self._ports:
                with socket.socket() as probe:
                    probe.bind((self._address, 0))
                    self._ports[name] = probe.getsockname()[1]
            return self._ports[name]
