"""A filter of system calls (seccomp): no sockets, no reach into other processes, no mounts.

What a denied call gets is EPERM. Written for x86-64 and 64-bit ARM; elsewhere there is none.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct

from . import libc

_SECCOMP_MODE_FILTER = 2
_LOAD, _EQUAL, _AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_ALLOW, _DENY, _KILL = 0x7FFF0000, 0x00050001, 0x80000000
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000  # x86-64's other numbers of the same calls

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Numbers on x86-64 and on 64-bit ARM.
_DENIED = {
    "socket": (41, 198),
    "io_uring_setup": (425, 425),  # makes sockets too
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
}
# Calls whose first argument is a process: allowed for the program's own.
_OF_PROCESSES = {
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "prlimit64": (302, 261),  # 0, too, is the caller itself
}


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def install() -> None:
    """Filter the calls of this process and of all that come out of it.

    Raises:
        OSError: the kernel or the processor has no such filter, or no_new_privs is not set.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(f"no filter is written for {machine}")
    code = b"".join(_instructions(machine))
    buffer = ctypes.create_string_buffer(code, len(code))
    program = _Program(len(code) // 8, ctypes.addressof(buffer))
    libc.prctl(libc.PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(program))


def _instructions(machine: str) -> list[bytes]:
    column = list(_ARCHITECTURES).index(machine)
    own = os.getpid()
    lines = [
        _line(_LOAD, _ARCHITECTURE),
        _line(_EQUAL, _ARCHITECTURES[machine], skip_if=1),
        _line(_RETURN, _KILL),
        _line(_LOAD, _NUMBER),
    ]
    if machine == "x86_64":
        lines += [_line(_AT_LEAST, _X32, skip_else=1), _line(_RETURN, _DENY)]
    for numbers in _DENIED.values():
        lines += [_line(_EQUAL, numbers[column], skip_else=1), _line(_RETURN, _DENY)]
    for name, numbers in _OF_PROCESSES.items():
        allowed = [own, 0] if name == "prlimit64" else [own]
        check = [_line(_LOAD, _FIRST_ARGUMENT)]
        for i, process in enumerate(allowed):
            check.append(_line(_EQUAL, process, skip_if=len(allowed) - i))
        check += [_line(_RETURN, _DENY), _line(_RETURN, _ALLOW)]
        lines += [_line(_EQUAL, numbers[column], skip_else=len(check)), *check]
    return [*lines, _line(_RETURN, _ALLOW)]


def _line(code: int, value: int, skip_if: int = 0, skip_else: int = 0) -> bytes:
    return struct.pack("=HBBI", code, skip_if, skip_else, value)
