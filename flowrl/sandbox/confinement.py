"""The steps that confine a process: namespaces, a root of its own, an identity of its own, limits. Linux, by its calls.

Runs in the small process of `launch.py`, with the standard library alone. Every step raises OSError naming itself.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
from collections.abc import Iterable
from typing import TypedDict

from flowrl.sandbox.calls import refuse_calls

STEP_FAILED = 125

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV = 2, 4
MS_BIND, MS_REC, MS_PRIVATE = 4096, 16384, 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, AT_RECURSIVE, AT_FDCWD = 1, 2, 0x8000, -100
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 4, 38, 36
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
SYS_CAPSET = {"x86_64": 126, "aarch64": 91}
SYS_MOUNT_SETATTR = 442
CAPABILITY_VERSION_3 = 0x20080522

OWN_USER_INSIDE = 1000
STAGE = "/proc"  # exists everywhere, and is not needed any more where it is covered
HOME = "/sandbox"
MOST_OPEN_FILES = 64
NICENESS = 5
READABLE = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/etc/ld.so.cache")
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")

_libc = ctypes.CDLL(None, use_errno=True)


class Job(TypedDict):
    """What `sandbox.py` asks for. user: that of the code, outside; 0 where it stays the caller's. python: the prefix of
    the interpreter."""

    code: str
    isolation: str
    user: int
    wall_s: float
    cpu_s: int
    memory_bytes: int
    processes: int
    files_bytes: int
    output_bytes: int
    paths: list[str]
    python: str
    directory: str


def unshare() -> None:
    """Namespaces of its own for this process's children. Without root, a user namespace comes first and gives the right
    to the others; the user in it stays, outside, the one that called."""
    kinds = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET
    user, group = os.geteuid(), os.getegid()
    if user:
        _call("user namespace", _libc.unshare(CLONE_NEWUSER))
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{OWN_USER_INSIDE} {user} 1"),
            ("gid_map", f"{OWN_USER_INSIDE} {group} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _call("namespaces", _libc.unshare(kinds))


def watch_descendants() -> None:
    """Without namespaces: orphans of this process's children become its own, so that it finds them."""
    _call("subreaper", _libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0))


def kill_descendants() -> None:
    """Until none is left. They cannot outrun it: what they may have is limited, and all are stopped first."""
    for act in (signal.SIGSTOP, signal.SIGKILL):
        while True:
            over = "ZT" if act == signal.SIGSTOP else "Z"
            found = [pid for pid in _descendants(os.getpid()) if not _has_state(pid, over)]
            for pid in found:
                try:
                    os.kill(pid, act)
                except ProcessLookupError:
                    continue
            if not found:
                break
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _descendants(parent: int) -> list[int]:
    try:
        with open(f"/proc/{parent}/task/{parent}/children") as file:
            children = [int(pid) for pid in file.read().split()]
    except FileNotFoundError:
        return []
    return children + [deeper for child in children for deeper in _descendants(child)]


def _has_state(pid: int, states: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] in states
    except (FileNotFoundError, ProcessLookupError):
        return True


def confine(job: Job) -> None:
    """In the first child. With namespaces: a root with an interpreter, read-only, and one small place to write."""
    if job["isolation"] == "full":
        _new_root(job)
        _call("host name", _libc.sethostname(b"sandbox", 7))
    else:
        os.chdir(job["directory"])
    _call("parent-death signal", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _call("undumpable", _libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))


def _new_root(job: Job) -> None:
    """What is there afterwards: `READABLE`, the interpreter and `job.paths`, all read-only; four devices; `HOME`.
    No /proc. The root is chrooted into, too: whoever is cannot make user namespaces."""
    _mount(None, "/", None, MS_REC | MS_PRIVATE)
    _mount("none", STAGE, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")
    root = f"{STAGE}/root"
    for path in _outermost((*READABLE, job["python"], *job["paths"])):
        _show(path, root + path)
        if not os.path.islink(path):
            _set_attributes(root + path, MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, AT_RECURSIVE)
    for path in DEVICES:
        _show(path, root + path)
    os.mkdir(root + HOME)
    _mount("none", root + HOME, "tmpfs", MS_NOSUID | MS_NODEV, f"mode=777,size={job['files_bytes']},nr_inodes=4096")
    if not os.path.lexists(f"{root}/tmp"):
        os.symlink(HOME, f"{root}/tmp")
    _set_attributes(STAGE, MOUNT_ATTR_RDONLY, 0)
    os.chdir(STAGE)
    _call("pivot_root", _libc.syscall(_number(SYS_PIVOT_ROOT), b".", b"."))
    _call("umount", _libc.umount2(b".", MNT_DETACH))
    os.chroot("/root")
    os.chdir(HOME)


def _outermost(paths: Iterable[str]) -> list[str]:
    """Those that exist and do not lie within another, except behind a link."""
    found: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths if os.path.lexists(path)}):
        if not any(path.startswith(f"{other}/") for other in found):
            found.append(path)
    return found


def _show(path: str, target: str) -> None:
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(path):
        os.symlink(os.readlink(path), target)
        return
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, MS_BIND | MS_REC)


def drop(job: Job) -> None:
    """In the code's own process: its limits, no privilege left to raise them, no call that goes around them."""
    bounds = {
        resource.RLIMIT_CPU: job["cpu_s"],
        resource.RLIMIT_AS: job["memory_bytes"],
        resource.RLIMIT_NPROC: job["processes"],
        resource.RLIMIT_FSIZE: job["files_bytes"],
        resource.RLIMIT_NOFILE: MOST_OPEN_FILES,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    for bound, most in bounds.items():
        resource.setrlimit(bound, (most, most))
    os.setsid()
    os.nice(NICENESS)
    if job["user"]:
        os.setgroups([])
        os.setresgid(job["user"], job["user"], job["user"])
        os.setresuid(job["user"], job["user"], job["user"])
    if not os.access(os.__file__, os.R_OK):
        raise OSError(errno.EACCES, "other users cannot read it", f"the interpreter's library, {os.__file__}")
    _call("no new privileges", _libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _give_up_capabilities()
    _call("parent-death signal", _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    _call("system call filter", refuse_calls(_libc))


def _give_up_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    none = (ctypes.c_uint32 * 6)()
    _call("capset", _libc.syscall(_number(SYS_CAPSET), ctypes.byref(header), ctypes.byref(none)))


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    result = _libc.syscall(
        SYS_MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, ctypes.byref(wanted), ctypes.c_size_t(ctypes.sizeof(wanted))
    )
    _call(f"mount_setattr {path}", result)


def _number(calls: dict[str, int]) -> int:
    machine = os.uname().machine
    if machine not in calls:
        raise OSError(errno.ENOSYS, f"not known on {machine}", "system call")
    return calls[machine]


def _mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    encoded = [None if text is None else text.encode() for text in (source, target, kind)]
    _call(f"mount {target}", _libc.mount(*encoded, ctypes.c_ulong(flags), None if data is None else data.encode()))


def _call(step: str, result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), step)
