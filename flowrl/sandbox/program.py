"""Runs the code in the process that is confined by now. What it prints and how it ends is all that leaves it."""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Sequence
from typing import NoReturn

NAME = "<program>"


def run_program(code: str, paths: Sequence[str]) -> NoReturn:
    """As `python program.py` would: an exception ends it with its traceback and 1, `sys.exit` with its status."""
    here = sys.path[0]
    sys.path[:] = [*paths, *(path for path in sys.path[1:] if path != here)]
    sys.argv = [NAME]
    sys.executable = getattr(sys, "_base_executable", sys.executable)
    sys.stdin = os.fdopen(0)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="replace")
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="replace", buffering=1)
    for name in [name for name in sys.modules if name.split(".")[0] in ("flowrl", "ctypes", "resource")]:
        del sys.modules[name]
    os.environ.clear()
    os.environ |= {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": os.getcwd(),
        "LANG": "C.UTF-8",
        "TMPDIR": os.getcwd(),
    }
    linecache.cache[NAME] = (len(code), None, code.splitlines(keepends=True), NAME)
    status = _execute(code)
    try:
        sys.stdout.flush()
    except (OSError, ValueError):
        status = status or 1
    os._exit(status)


def _execute(code: str) -> int:
    try:
        exec(compile(code, NAME, "exec"), {"__name__": "__main__", "__builtins__": __builtins__})
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return (end.code or 0) & 0xFF
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        own = error.__traceback__.tb_next if error.__traceback__ is not None else None
        traceback.print_exception(type(error), error, own)
        return 1
    return 0
