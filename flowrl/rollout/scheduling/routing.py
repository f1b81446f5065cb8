"""Which of several servers takes a request: the least loaded, or the one that has computed its prompt already. Pure."""

from __future__ import annotations

from collections import OrderedDict

Prompt = tuple[int, ...]

_REMEMBERED = 4096
# A prompt stays where it is cached while that server has at most so many requests more than the least loaded.
_SLACK_REQUESTS = 4
_SLACK_SHARE = 0.25


class Router:
    """Servers are numbers from 0. Ties go to the lowest."""

    def __init__(self, num_servers: int) -> None:
        self.num_running = [0] * num_servers
        self._known: OrderedDict[Prompt, int] = OrderedDict()

    def choose(self, prompt: Prompt) -> int:
        """The server for a request, which counts as running there until `leave`."""
        least = min(range(len(self.num_running)), key=self.num_running.__getitem__)
        server = self._known.get(prompt, least)
        limit = self.num_running[least] * (1 + _SLACK_SHARE) + _SLACK_REQUESTS
        if self.num_running[server] > limit:
            server = least
        self._known[prompt] = server
        self._known.move_to_end(prompt)
        if len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        self.num_running[server] += 1
        return server

    def leave(self, server: int) -> None:
        self.num_running[server] -= 1
