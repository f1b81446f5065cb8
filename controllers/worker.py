"""A worker process: `python -m controllers.worker NAME SPEC_FD LIFELINE_FD`, started by `process.py`, or forked by
`nursery.py`.

Owns the child's side of life and death: it dies with its controller, however that dies. What it does is its target's.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import threading
import traceback
from types import FrameType

import msgspec

from controllers import stacks
from controllers.context import WorkerContext
from controllers.control import ControlChannel
from controllers.dotted import load_attribute
from controllers.messages import Failed, Finished, WorkerSpec

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_PR_SET_PDEATHSIG = 1


def main(spec_fd: int, lifeline_fd: int) -> int:
    """Exit code: 0 if the target returned, 1 if it raised."""
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # the supervisor, or a person, asks where it is
    spec = _read_spec(spec_fd)
    _tie_to_parent(spec.parent, lifeline_fd)
    control = ControlChannel(spec.control_endpoint, spec.identity)
    stacks.show_on_signal(lambda: _waiting_lines(control))
    _install_signals(control)
    control.start()
    try:
        load_attribute(spec.target)(WorkerContext(spec, control))
    except BaseException as error:
        traceback.print_exc()
        reason = "".join(traceback.format_exception_only(_first(error))).strip().splitlines()[-1]
        control.close(Failed(reason, traceback.format_exc()))
        return 1
    control.close(Finished())
    return 0


def _first(error: BaseException) -> BaseException:
    """What happened, of errors that tasks gathered."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def limit_threads(threads: int) -> None:
    """For libraries that are loaded by now, and for what this process starts. (Others read the environment at their
    start.)"""
    os.environ.update({name: str(threads) for name in THREAD_VARIABLES})
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(threads)


def _read_spec(spec_fd: int) -> WorkerSpec:
    with os.fdopen(spec_fd, "rb") as file:
        return msgspec.json.decode(file.read(), type=WorkerSpec)


def _tie_to_parent(parent: int, lifeline_fd: int) -> None:
    """Three ties: the kernel's signal at the parent's death, its absence by now, and the end of the lifeline pipe."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)

    def watch() -> None:
        os.read(lifeline_fd, 1)  # nobody writes: it returns when the controller's end is closed
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _waiting_lines(control: ControlChannel) -> list[str]:
    return [f"waits for {what}, for {since_s:.1f} s" for what, since_s in control.waits()] or ["waits for nothing"]


def _install_signals(control: ControlChannel) -> None:
    def on_terminate(_signum: int, _frame: FrameType | None) -> None:
        control.signal_stop()

    signal.signal(signal.SIGTERM, on_terminate)
    # The terminal sends it to everybody; the controller decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[2]), int(sys.argv[3])))
