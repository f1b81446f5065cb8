"""System calls that the confined code does without: a seccomp filter, made here and handed to the kernel.

Two kinds are refused. Some hold memory that no limit of a process counts, and that may outlive it: System V's shared
memory, message queues, files without a name, keys. Others open parts of the kernel that a program of this kind never
needs and that have let others out. Each fails with "Operation not permitted", for the code and for all that it starts.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

UNCOUNTED = {
    "shmget": (29, 194), "shmat": (30, 196), "semget": (64, 190), "msgget": (68, 186), "mq_open": (240, 180),
    "memfd_create": (319, 279), "memfd_secret": (447, 447),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
}  # fmt: skip
UNNEEDED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsmount": (432, 432), "mount_setattr": (442, 442), "open_by_handle_at": (304, 265),
}  # fmt: skip
"""Numbers on x86_64 and aarch64, by the kernel's tables."""

MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
"""Column above, and what the kernel calls the machine (AUDIT_ARCH)."""

_PR_SET_SECCOMP, _MODE_FILTER = 22, 2
_LOAD, _JUMP_IF_EQUAL, _JUMP_IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER_AT, _MACHINE_AT = 0, 4
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | errno.EPERM, 0x80000000
_OTHER_TABLE = 0x40000000  # from here on numbers are of x86_64's second table, with other meanings


class _Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p)]


def refuse_calls(libc: ctypes.CDLL) -> int:
    """For this process and its children, for good. The result of the kernel's call; needs `no_new_privs`. Raises
    OSError on a machine whose numbers are not known here."""
    instructions = _instructions(os.uname().machine)
    program = _Program(len(instructions) // 8, instructions)
    return int(libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0))


def _instructions(machine: str) -> bytes:
    """Whoever calls by another machine's table (a 32-bit program) is killed: its numbers mean other things."""
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"not known on {machine}", "system call filter")
    column, name = MACHINES[machine]
    numbers = sorted(pair[column] for pair in (UNCOUNTED | UNNEEDED).values())
    body = [_instruction(_JUMP_IF_AT_LEAST, _OTHER_TABLE, len(numbers) + 1, 0)]
    body += [_instruction(_JUMP_IF_EQUAL, number, len(numbers) - at, 0) for at, number in enumerate(numbers)]
    head = [
        _instruction(_LOAD, _MACHINE_AT),
        _instruction(_JUMP_IF_EQUAL, name, 1, 0),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER_AT),
    ]
    return b"".join([*head, *body, _instruction(_RETURN, _ALLOW), _instruction(_RETURN, _REFUSE)])


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
