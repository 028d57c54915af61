"""Linux system calls that Python has no function for."""

from __future__ import annotations

import ctypes
import os

_LIBC = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG = 1
PR_SET_SECCOMP = 22
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

CLONE_NEWNS = 0x00020000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_NOATIME, MS_NODIRATIME, MS_BIND = 32, 1024, 2048, 4096
MS_REC, MS_PRIVATE, MS_RELATIME = 16384, 1 << 18, 1 << 21


def prctl(option: int, *values: object) -> None:
    """prctl(2); raises OSError."""
    padded = [*values, 0, 0, 0, 0][:4]
    _check(_LIBC.prctl(option, *map(_argument, padded)))


def unshare(flags: int) -> None:
    """unshare(2); raises OSError."""
    _check(_LIBC.unshare(flags))


def mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    """mount(2); raises OSError."""
    encoded = [None if name is None else os.fsencode(name) for name in (source, target, kind)]
    _check(_LIBC.mount(*encoded, ctypes.c_ulong(flags), os.fsencode(options)))


def syscall(number: int, *arguments: object) -> int:
    """syscall(2) with whole numbers and pointers; raises OSError."""
    result: int = _LIBC.syscall(ctypes.c_long(number), *map(_argument, arguments))
    _check(result)
    return result


def _argument(value: object) -> object:
    return ctypes.c_ulong(value) if isinstance(value, int) else value


def _check(result: int) -> None:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
