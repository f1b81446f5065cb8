"""One SGLang server as a child process: started, awaited, ended. What it is told to do is `client.py`'s.

The server runs in a process group of its own under a small keeper (`keeper.py`), which ends the whole group with the
server, and with the process that started it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from controllers.process import exit_text, log_tail
from flowrl.rollout.engine import EngineError
from flowrl.rollout.sglang.arguments import ServerSettings, command_line, environment
from flowrl.rollout.sglang.client import SGLangClient

_KEEPER = Path(__file__).with_name("keeper.py")
_LOOK_EVERY_S = 0.25
_LOOK_TIMEOUT_S = 30.0
_TERMINATE_GRACE_S = 5.0
_KILL_GRACE_S = 10.0
_TAIL_LINES = 25


class ServerProcess:
    """url and name are known once `launch` has been called. Launch it from the thread that lives as long as the
    process: the kernel ties the parent-death signal to that thread."""

    def __init__(self, settings: ServerSettings) -> None:
        self._settings = settings
        self._process: asyncio.subprocess.Process | None = None
        self.url = ""
        self.name = ""

    async def launch(self, model: Path, version: int) -> None:
        """Starts the server on `model` and names its weights `version`. It is not ready yet."""
        settings = self._settings
        port = settings.port or _free_port(settings.host)
        self.url = f"http://{settings.host}:{port}"
        self.name = f"SGLang server {self.url} (log: {settings.log_path})"
        command = [sys.executable, "-I", "-S", str(_KEEPER), str(os.getpid())]
        command += command_line(settings, model, version, port)
        settings.log_path.parent.mkdir(parents=True, exist_ok=True)
        with settings.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                env=environment(settings, os.environ),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )

    async def ready(self, client: SGLangClient) -> None:
        """Returns when the server has generated a token. EngineError if it ends first, or is late."""
        exited = asyncio.create_task(self.exited())
        deadline = time.monotonic() + self._settings.startup_timeout_s
        try:
            while not await _is_ready(client):
                await asyncio.wait({exited}, timeout=_LOOK_EVERY_S)
                if exited.done():
                    raise EngineError(f"{self.name} did not start: {exited.result()}")
                if time.monotonic() > deadline:
                    late = f"not ready after {self._settings.startup_timeout_s} s"
                    raise EngineError(f"{self.name} did not start: {late}\n{self._last_lines()}")
        finally:
            exited.cancel()

    async def exited(self) -> str:
        """Waits for the server's end and tells of it, with the last lines of its log."""
        assert self._process is not None, "the server has not been launched"
        code = await self._process.wait()
        return f"{exit_text(code)}\n{self._last_lines()}"

    async def close(self) -> None:
        """Asks the server to end, then kills it. Returns when it is gone with all that it started."""
        process, self._process = self._process, None
        if process is None:
            return
        for signum, grace_s in ((signal.SIGTERM, _TERMINATE_GRACE_S), (signal.SIGHUP, _KILL_GRACE_S)):
            with suppress(ProcessLookupError):
                process.send_signal(signum)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), grace_s)
        if process.returncode is None:
            raise EngineError(f"{self.name} could not be ended: process {process.pid} keeps it")

    def _last_lines(self) -> str:
        return log_tail(self._settings.log_path, _TAIL_LINES)


async def _is_ready(client: SGLangClient) -> bool:
    try:
        return await client.generates(_LOOK_TIMEOUT_S)
    except EngineError:
        # Nobody listens yet. If that stays so, `ready` gives up and says why.
        return False


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
