"""The sandbox against code that means harm. Every attack runs for real; what is checked is what it could not do."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from flowrl.config.episodes import SandboxConfig
from flowrl.sandbox.report import describe
from flowrl.sandbox.sandbox import Outcome, Sandbox, SandboxUnavailable

SMALL = {"wall_s": 3.0, "memory_mb": 256, "output_kb": 4, "files_mb": 4}


DETACHING = """
import os, time
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        time.sleep(60)
print('gone')
"""
KILLING = """
import os, signal
for pid in (-1, os.getppid(), %d):
    try:
        os.kill(pid, signal.SIGKILL)
    except OSError as error:
        print(error.strerror)
print('alive')
"""


HOARDING = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
libc.shmat.restype = ctypes.c_void_p
libc.shmdt.argtypes = [ctypes.c_void_p]
for size in [64 << 20] * 8:
    segment = libc.shmget(0, size, 0o1600)
    if segment < 0:
        print('no segment:', os.strerror(ctypes.get_errno()))
        break
    place = libc.shmat(segment, None, 0)
    ctypes.memset(place, 1, size)
    libc.shmdt(place)
try:
    files = [os.memfd_create('x') for _ in range(8)]
    print(sum(os.write(file, bytes(4 << 20)) for file in files))
except OSError as error:
    print('no file:', error.strerror)
add_key = 248 if os.uname().machine == 'x86_64' else 217
print('no key:' if libc.syscall(add_key, b'user', b'note', b'x', 1, -4) < 0 else 'a key')
"""
WITHOUT_THE_RIGHT = """
import ctypes, sys
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) == 0
import os
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def try_isolation(isolation: str) -> str:
    """Why it is not possible here, or nothing."""
    sandbox = Sandbox(SandboxConfig(isolation=isolation))
    try:
        sandbox.check()
    except SandboxUnavailable as error:
        return str(error)
    finally:
        sandbox.close()
    return ""


REFUSED = {isolation: try_isolation(isolation) for isolation in ("full", "limits")}


@pytest.fixture(params=["full", "limits"])
def either(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    yield from sandbox_of(request.param)


@pytest.fixture
def full() -> Iterator[Sandbox]:
    yield from sandbox_of("full")


@pytest.fixture(params=["full", "limits"])
def hasty(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """For what only time ends."""
    yield from sandbox_of(request.param, wall_s=1.0)


@pytest.fixture(params=["full", "limits"])
def patient(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    """For what takes its time on a busy machine."""
    yield from sandbox_of(request.param, wall_s=30.0)


def sandbox_of(isolation: str, **more: float) -> Iterator[Sandbox]:
    if REFUSED[isolation]:
        pytest.skip(REFUSED[isolation])
    sandbox = Sandbox(SandboxConfig(isolation=isolation, **SMALL | more))
    yield sandbox
    sandbox.close()


@pytest.fixture(autouse=True)
def _nothing_is_left() -> Iterator[None]:
    yield
    assert not [child for child in psutil.Process().children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE]
    assert not list(Path("/tmp").glob("flowrl-sandbox-*"))


def test_a_program_runs_and_its_output_comes_back(either: Sandbox) -> None:
    outcome = either.run_blocking("import sys, json\nprint(json.dumps([1, 2]))\nprint('oh', file=sys.stderr)")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "[1, 2]\n", "oh\n")
    assert not outcome.timed_out and outcome.cut_bytes == 0


def test_an_error_comes_back_as_its_traceback(either: Sandbox) -> None:
    outcome = either.run_blocking("def f():\n    return 1 / 0\nf()")
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("Traceback") and outcome.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert "launch" not in outcome.stderr and "line 2, in f" in outcome.stderr


@pytest.mark.parametrize(
    ("code", "status"), [("import sys; sys.exit(3)", 3), ("raise SystemExit('no')", 1), ("x = (", 1)]
)
def test_the_status_is_the_programs_own(either: Sandbox, code: str, status: int) -> None:
    assert either.run_blocking(code).exit_code == status


def test_a_fork_bomb_is_bounded_and_leaves_nothing(either: Sandbox) -> None:
    outcome = either.run_blocking("import os\nwhile True:\n    os.fork()")
    assert outcome.exit_code and ("BlockingIOError" in outcome.stderr or outcome.timed_out)


def test_ten_gigabytes_are_not_to_be_had(either: Sandbox) -> None:
    outcome = either.run_blocking("x = bytearray(10 << 30)")
    assert "MemoryError" in outcome.stderr


def test_an_endless_loop_is_ended_in_time(hasty: Sandbox) -> None:
    started = time.monotonic()
    outcome = hasty.run_blocking("while True: pass")
    assert outcome.timed_out and outcome.wall_s >= 1
    assert time.monotonic() - started < 60
    assert "ran longer than" in describe(outcome)


def test_a_program_that_detaches_is_ended_with_all_that_it_started(either: Sandbox) -> None:
    outcome = either.run_blocking(DETACHING)
    assert outcome.stdout == "gone\n" and not outcome.timed_out


def test_output_without_end_is_cut_and_counted(either: Sandbox) -> None:
    outcome = either.run_blocking("for number in range(1000): print('line', number)")
    whole = sum(len(f"line {number}\n") for number in range(1000))
    assert len(outcome.stdout) == 4096 and outcome.cut_bytes == whole - 4096
    assert "bytes more were cut" in describe(outcome)


@pytest.mark.parametrize("isolation", ["full", "limits"])
def test_output_faster_than_it_can_be_read_ends_in_time(isolation: str) -> None:
    for wall_s in (1.0, 5.0, 25.0):  # a busy machine may not have started it in the first of these
        with contextmanager(sandbox_of)(isolation, wall_s=wall_s) as sandbox:
            outcome = sandbox.run_blocking("while True: print('x' * 10000)")
        if outcome.stdout:
            break
    assert outcome.timed_out and len(outcome.stdout) == 4096


def test_memory_that_no_limit_counts_is_not_to_be_had(either: Sandbox) -> None:
    """Segments that nobody has attached, files without a name, keys: some of it would outlive the call."""
    outcome = either.run_blocking(HOARDING)
    refused = "Operation not permitted"
    assert outcome.stdout == f"no segment: {refused}\nno file: {refused}\nno key:\n", outcome


def test_ordinary_programs_do_without_what_is_refused(patient: Sandbox) -> None:
    outcome = patient.run_blocking(
        "import asyncio, subprocess, tempfile, threading\n"
        "thread = threading.Thread(target=print, args=('thread',)); thread.start(); thread.join()\n"
        "print(subprocess.run(['/bin/sh', '-c', 'echo shell'], capture_output=True, text=True).stdout, end='')\n"
        "tempfile.TemporaryFile().write(b'x'); asyncio.run(asyncio.sleep(0)); print('done')"
    )
    assert (outcome.stdout, outcome.stderr) == ("thread\nshell\ndone\n", "")


@pytest.mark.parametrize("code", ["print('\udcff')", "print(1)\0", "(" * 100_000, "import ctypes; ctypes.string_at(0)"])
def test_text_that_is_no_program_ends_as_one_that_failed(full: Sandbox, code: str) -> None:
    outcome = full.run_blocking(code)
    assert outcome.exit_code and not outcome.timed_out and not outcome.stdout


def test_there_is_nothing_to_read_from(either: Sandbox) -> None:
    assert either.run_blocking("import sys; print(repr(sys.stdin.read()))").stdout == "''\n"


def test_files_are_bounded(either: Sandbox) -> None:
    outcome = either.run_blocking("open('big', 'wb').write(b'x' * (8 << 20))")
    assert outcome.exit_code == 1 and "File too large" in outcome.stderr
    assert either.run_blocking("open('small', 'w').write('x'); print(open('small').read())").stdout == "x\n"


def test_the_parents_environment_is_not_passed_on(either: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "42")
    assert "SECRET" not in either.run_blocking("import os; print(os.environ)").stdout


def test_no_descriptor_of_the_parents_is_inherited(either: Sandbox) -> None:
    inherited = os.open("/dev/zero", os.O_RDONLY)
    os.set_inheritable(inherited, True)
    try:
        outcome = either.run_blocking(
            "import os\nfor fd in range(3, 64):\n    try: os.fstat(fd); print(fd)\n    except OSError: pass"
        )
    finally:
        os.close(inherited)
    assert outcome.stdout == ""


def test_no_privilege_is_left(either: Sandbox) -> None:
    outcome = either.run_blocking("import os\ntry: os.chroot('.')\nexcept OSError as error: print(error.strerror)")
    assert outcome.stdout == "Operation not permitted\n"


def test_limits_cannot_be_raised(either: Sandbox) -> None:
    outcome = either.run_blocking("import resource as r\nr.setrlimit(r.RLIMIT_AS, (1 << 40, 1 << 40))")
    assert "not allowed to raise maximum limit" in outcome.stderr


def test_no_network_can_be_reached(full: Sandbox) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = full.run_blocking(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)")
    assert outcome.exit_code == 1 and "create_connection" in outcome.stderr


def test_the_parents_files_are_not_there(full: Sandbox, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    tmp_path.chmod(0o777)
    for path in (tmp_path / "secret.txt", Path(__file__), Path("/etc/passwd"), Path("/proc/1/environ")):
        outcome = full.run_blocking(f"print(open({str(path)!r}).read())")
        assert "FileNotFoundError" in outcome.stderr, path


def test_nothing_outside_its_directory_can_be_written(full: Sandbox) -> None:
    for path in ("/x", "/usr/x", "/dev/x", f"{sys.base_prefix}/x"):
        outcome = full.run_blocking(f"open({path!r}, 'w')")
        assert "Read-only file system" in outcome.stderr or "Permission denied" in outcome.stderr, path
    assert not Path(sys.base_prefix, "x").exists()


def test_neither_the_parent_nor_anybody_else_can_be_killed(full: Sandbox) -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        outcome = full.run_blocking(KILLING % bystander.pid)
        assert "alive" in outcome.stdout and bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_it_can_make_no_namespaces_of_its_own(full: Sandbox) -> None:
    outcome = full.run_blocking("import ctypes\nprint(ctypes.CDLL(None).unshare(0x10000000))")
    assert outcome.stdout == "-1\n"


def test_one_run_leaves_nothing_to_the_next(either: Sandbox) -> None:
    either.run_blocking("open('note', 'w').write('hello')")
    assert either.run_blocking("import os; print(os.listdir('.'))").stdout == "[]\n"


def test_a_directory_can_be_shown_to_it_read_only(tmp_path: Path) -> None:
    if REFUSED["full"]:
        pytest.skip(REFUSED["full"])
    (tmp_path / "answers.py").write_text("answer = 42\n")
    tmp_path.chmod(0o755)
    sandbox = Sandbox(SandboxConfig(paths=[str(tmp_path)]))
    assert sandbox.run_blocking("import answers; print(answers.answer)").stdout == "42\n"
    assert "Read-only" in sandbox.run_blocking(f"open('{tmp_path}/x', 'w')").stderr
    sandbox.close()


def test_calls_run_side_by_side_from_one_loop(either: Sandbox) -> None:
    async def many() -> list[Outcome]:
        return await asyncio.gather(*(either.run(f"print({number} ** 2)") for number in range(24)))

    assert [outcome.stdout for outcome in asyncio.run(many())] == [f"{number**2}\n" for number in range(24)]


def test_where_isolation_is_not_possible_nothing_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails inside, for real: a limit that the kernel refuses."""
    if REFUSED["full"]:
        pytest.skip(REFUSED["full"])
    sandbox = Sandbox(SandboxConfig(paths=[str(tmp_path)]))
    monkeypatch.setattr(sandbox, "_job", lambda *given: {**Sandbox._job(sandbox, *given), "processes": -7})
    marker = tmp_path / "ran"
    with pytest.raises(SandboxUnavailable, match=r"sandbox.isolation: 'full'; not possible here"):
        sandbox.run_blocking(f"open({str(marker)!r}, 'w')")
    sandbox.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give up the right to make namespaces")
def test_where_namespaces_are_not_allowed_the_refusal_names_the_step() -> None:
    program = (
        "from flowrl.config.episodes import SandboxConfig; from flowrl.sandbox.sandbox import *;"
        "s = Sandbox(SandboxConfig());"
        "\ntry: s.check()"
        "\nexcept SandboxUnavailable as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_RIGHT, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == (
        "rollout.sandbox.isolation: 'full'; not possible here (namespaces: Operation not permitted); give the run the "
        "right to make namespaces, or, for code that you trust, set it to 'limits'\n"
    ), done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_user_without_rights_gets_the_same_isolation(tmp_path: Path) -> None:
    if not other_users_can_run(sys.executable):
        pytest.skip(f"{sys.executable}: other users cannot run it")
    program = (
        "from flowrl.config.episodes import SandboxConfig; from flowrl.sandbox.sandbox import Sandbox;"
        "s = Sandbox(SandboxConfig()); s.check();"
        "print(s.run_blocking('import os; print(os.listdir(\".\"), os.getuid())').stdout)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], user=65534, group=65534, extra_groups=[], capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    if "namespace" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.stdout == "[] 1000\n\n", done.stderr


def other_users_can_run(path: str) -> bool:
    return subprocess.run(["/bin/sh", "-c", f"'{path}' -c 1"], user=65534, capture_output=True).returncode == 0
