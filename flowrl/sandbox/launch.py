"""The process beside untrusted code: starts it confined, ends it in time, and reports. A program of `sandbox.py`'s.

    sandbox.py  --job (stdin, JSON)-->  this process  --fork-->  init of the namespaces  --fork-->  the code
                <--report (stdout, JSON)--            <---------- output through two pipes -----------

Standard library only, for it starts once a call. A step of the confinement that fails is reported by name, and then no
code has run.
"""

from __future__ import annotations

import json
import os
import select
import signal
import sys
import time
from typing import Any

from flowrl.sandbox.confinement import STEP_FAILED, Job, confine, drop, kill_descendants, unshare, watch_descendants
from flowrl.sandbox.program import run_program

SETUP = 3
_CHUNK = 65536


def main() -> None:
    job: Job = json.load(sys.stdin)
    started = time.monotonic()
    streams = {"stdout": os.pipe(), "stderr": os.pipe(), "setup": os.pipe()}
    if job["isolation"] == "full":
        try:
            unshare()
        except OSError as error:
            return _write({"refused": _explain(error).decode()})
    else:
        watch_descendants()
    child = os.fork()
    if not child:
        _be_child(job, {name: ends[1] for name, ends in streams.items()})
    ends = {}
    for name, (reader, writer) in streams.items():
        os.close(writer)
        ends[name] = reader
    _write(_supervise(child, ends, job, started))


def _supervise(child: int, ends: dict[str, int], job: Job, started: float) -> dict[str, Any]:
    """Reads until the child has ended or its time is over; then everything that it started is killed."""
    kept = {name: Kept(job["output_bytes"]) for name in ends}
    pidfd = os.pidfd_open(child)
    readers = {reader: kept[name] for name, reader in ends.items()}
    has_ended = timed_out = False
    while not has_ended and not timed_out:
        left_s = started + job["wall_s"] - time.monotonic()
        ready, _, _ = select.select([pidfd, *readers], [], [], max(0.0, left_s))
        timed_out = left_s <= 0
        has_ended = pidfd in ready
        _read(ready, readers)
    if timed_out:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if job["isolation"] == "limits":
        kill_descendants()
    for reader in readers:
        os.set_blocking(reader, False)
    while readers and _read(list(readers), readers):
        pass
    code = os.waitstatus_to_exitcode(status)
    if kept["setup"].text:
        return {"refused": kept["setup"].text}
    return {
        "exit_code": code if code >= 0 else 128 - code,
        "timed_out": timed_out,
        "wall_s": time.monotonic() - started,
        **{name: kept[name].text for name in ("stdout", "stderr")},
        "cut_bytes": kept["stdout"].cut + kept["stderr"].cut,
    }


class Kept:
    """The beginning of a stream; the rest is counted."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.cut = 0
        self._data = bytearray()

    def add(self, data: bytes) -> None:
        room = self.most - len(self._data)
        self._data += data[:room]
        self.cut += max(0, len(data) - room)

    @property
    def text(self) -> str:
        return self._data.decode("utf-8", "replace")


def _read(ready: list[int], readers: dict[int, Kept]) -> bool:
    """What there is, once; whether there was anything."""
    got_any = False
    for reader in ready:
        if reader not in readers:
            continue
        try:
            data = os.read(reader, _CHUNK)
        except BlockingIOError:
            continue
        if data:
            readers[reader].add(data)
            got_any = True
        else:
            del readers[reader]
    return got_any


def _be_child(job: Job, writers: dict[str, int]) -> None:
    """Never returns. In namespaces this process is their init: when it ends, the kernel kills all that is left."""
    code = STEP_FAILED
    try:
        confine(job)
        worker = os.fork()
        if not worker:
            _run(job, writers)
        for writer in writers.values():
            os.close(writer)
        while True:
            pid, status = os.wait()
            if pid == worker:
                code = os.waitstatus_to_exitcode(status)
                break
    except BaseException as error:
        os.write(writers["setup"], _explain(error))
    finally:
        os._exit(code if code >= 0 else 128 - code)


def _run(job: Job, writers: dict[str, int]) -> None:
    """Never returns: this is the code's own process."""
    try:
        null = os.open("/dev/null", os.O_RDWR)
        for target, source in enumerate((null, writers["stdout"], writers["stderr"])):
            os.dup2(source, target)
        os.dup2(writers["setup"], SETUP, inheritable=False)
        os.closerange(SETUP + 1, 256)
        drop(job)
        os.close(SETUP)
    except BaseException as error:
        os.write(SETUP, _explain(error))
        os._exit(STEP_FAILED)
    run_program(job["code"], job["paths"])


def _explain(error: BaseException) -> bytes:
    if isinstance(error, OSError):
        return f"{error.filename or 'setup'}: {error.strerror}".encode()
    return repr(error).encode()


def _write(report: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(report))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
