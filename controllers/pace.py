"""How often a node may speak to the clock: so many messages for each version, however many rows that has.

What waits goes together in the next message, in order. It costs a little time, and only where a node has had its share
of a version's messages already. Pure: time is an argument.
"""

from __future__ import annotations

A_VERSION = 8
AT_ONCE = 8
LONGEST_S = 0.25
_NEW = 0.3
_ROUNDING = 1e-6


class Pace:
    """Credit for `at_once` messages, which comes back at `a_version` for the time that a version takes. Free until two
    versions have been heard of; never a longer wait than LONGEST_S, so that long updates lose nothing by it."""

    def __init__(self, a_version: int = A_VERSION, at_once: int = AT_ONCE) -> None:
        self._a_version = a_version
        self._at_once = at_once
        self._credit = float(at_once)
        self._counted_s = 0.0
        self._version: int | None = None
        self._heard_s = 0.0
        self._version_s: float | None = None

    def heard(self, version: int, now: float) -> None:
        """Of the policy; several versions at once share their time."""
        if self._version is not None and version > self._version:
            took_s = (now - self._heard_s) / (version - self._version)
            self._version_s = took_s if self._version_s is None else (1 - _NEW) * self._version_s + _NEW * took_s
        if version != self._version:
            self._version, self._heard_s = version, now

    def wait_s(self, now: float) -> float:
        """Until the next message may go; 0 for at once."""
        self._refill(now)
        missing = 1 - self._credit
        return 0.0 if missing < _ROUNDING else missing * self._interval_s

    def sent(self, now: float) -> None:
        self._refill(now)
        self._credit = max(0.0, self._credit - 1)

    @property
    def _interval_s(self) -> float:
        return 0.0 if self._version_s is None else min(LONGEST_S, self._version_s / self._a_version)

    def _refill(self, now: float) -> None:
        interval_s = self._interval_s
        gained = (now - self._counted_s) / interval_s if interval_s > 0 else self._at_once
        self._credit = min(float(self._at_once), self._credit + gained)
        self._counted_s = now
