"""Which of several servers takes a request: the least loaded, or the one that has computed its beginning. Pure."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

Prompt = tuple[int, ...]

_REMEMBERED = 65536
_BLOCK_TOKENS = 32
# A prompt stays where it is cached while that server has at most so many requests more than the least loaded.
_SLACK_REQUESTS = 4
_SLACK_SHARE = 0.25


class Router:
    """Servers are numbers from 0, all of them open at first. Ties go to the lowest."""

    def __init__(self, num_servers: int) -> None:
        self.num_running = [0] * num_servers
        self._open = set(range(num_servers))
        self._known: OrderedDict[int, int] = OrderedDict()

    def choose(self, prompt: Prompt) -> int:
        """The server for a request, which counts as running there until `leave`. One must be open."""
        least = min(sorted(self._open), key=self.num_running.__getitem__)
        keys = list(prefix_keys(prompt))
        server = next((self._known[key] for key in reversed(keys) if key in self._known), least)
        limit = self.num_running[least] * (1 + _SLACK_SHARE) + _SLACK_REQUESTS
        if server not in self._open or self.num_running[server] > limit:
            server = least
        for key in keys:
            self._known[key] = server
            self._known.move_to_end(key)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        self.num_running[server] += 1
        return server

    def leave(self, server: int) -> None:
        self.num_running[server] -= 1

    def close(self, server: int) -> None:
        """It takes no request until `open`."""
        self._open.discard(server)

    def open(self, server: int) -> None:
        """It starts with nothing cached."""
        self._open.add(server)
        self._known = OrderedDict((key, known) for key, known in self._known.items() if known != server)

    def forget(self) -> None:
        """Nothing that was cached is of use any more."""
        self._known.clear()


def prefix_keys(prompt: Prompt) -> Iterator[int]:
    """A key for each of the prompt's beginnings, of whole blocks, and for all of it: shortest first."""
    key = 0
    for start in range(0, len(prompt), _BLOCK_TOKENS):
        key = hash((key, prompt[start : start + _BLOCK_TOKENS]))
        yield key
