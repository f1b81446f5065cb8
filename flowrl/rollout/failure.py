"""How an episode fails: with a reason that is counted, and a line for people."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An episode that came to nothing. reason: a word that is counted, as 'environment_timeout'. detail: for people."""

    reason: str
    detail: str


class EpisodeFailed(Exception):
    """Raised within an episode to end it as a `Failure`."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.failure = Failure(reason=reason, detail=detail)
