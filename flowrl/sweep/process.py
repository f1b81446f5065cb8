"""One point's run as a process: started, asked to end, killed, reaped. When and why is `work.py`'s."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from controllers.reaper import Reaper

GRACE_S = 45.0
"""From a point's SIGTERM to its SIGKILL: a run ends in order within its own deadlines, which are shorter."""
ENDED_EARLY = "the run ended early: "
TAIL_BYTES = 16384


class PointProcess:
    """`flowrl run` in a process group of its own, so that a Ctrl-C is the sweep's to pass on. Dies with the sweep: the
    reaper kills the group, and the run's own workers die with their controller."""

    def __init__(self, arguments: Sequence[str], log: Path, reaper: Reaper, environment: Mapping[str, str]) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as opened:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "flowrl", "run", *arguments],
                env={**os.environ, **environment},
                stdin=subprocess.DEVNULL,
                stdout=opened,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._log = log
        self._reaper = reaper
        reaper.watch(self._popen.pid)
        self.started = time.monotonic()
        self._kill_at: float | None = None

    @property
    def wall_s(self) -> float:
        return round(time.monotonic() - self.started, 2)

    @property
    def is_ending(self) -> bool:
        return self._kill_at is not None

    def end(self) -> None:
        """Asks for an orderly end; `poll` kills what does not heed it."""
        if self._kill_at is None:
            self._kill_at = time.monotonic() + GRACE_S
            self._popen.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Now, with all of its group; waits until it is gone."""
        os.killpg(self._popen.pid, signal.SIGKILL)
        self._popen.wait()

    def poll(self) -> int | None:
        """The exit code once it has ended; nothing of its group is left then."""
        if self._popen.poll() is None:
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                os.killpg(self._popen.pid, signal.SIGKILL)
            return None
        self._reaper.forget(self._popen.pid)
        return self._popen.returncode

    def reason(self) -> str:
        """Why it ended early, in its own words: those after `ENDED_EARLY`, or else its last line."""
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - TAIL_BYTES))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        early = [line.removeprefix(ENDED_EARLY) for line in lines if line.startswith(ENDED_EARLY)]
        return (early or lines or ["it printed nothing"])[-1]
