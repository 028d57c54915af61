"""The processes that came out of this one, by /proc."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator

_PAGE = os.sysconf("SC_PAGE_SIZE")


def descendants() -> list[int]:
    """Process ids of this process's children, their children, and so on."""
    children: dict[int, list[int]] = {}
    for process in map(int, filter(str.isdigit, os.listdir("/proc"))):
        parent = _parent(process)
        if parent is not None:
            children.setdefault(parent, []).append(process)
    return list(_below(os.getpid(), children))


def resident_bytes(processes: list[int]) -> int:
    """Memory that these processes hold, shared pages counted for each."""
    return sum(map(_resident, processes))


def tasks_of_user(user: int) -> int:
    """How many processes and threads a user has."""
    count = 0
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):  # it has ended
            if os.stat(f"/proc/{process}").st_uid == user:
                count += len(os.listdir(f"/proc/{process}/task"))
    return count


def kill_descendants(seconds: float = 5.0) -> None:
    """Kill them until none is left. This process must be the one that orphans fall to."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        processes = descendants()
        for stop in (signal.SIGSTOP, signal.SIGKILL):  # first see that none goes on forking
            for process in processes:
                _signal(process, stop)
        _reap()
        if not processes:
            return
        time.sleep(0.002)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _signal(process: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(process, number)


def _below(process: int, children: dict[int, list[int]]) -> Iterator[int]:
    for child in children.get(process, ()):
        yield child
        yield from _below(child, children)


def _parent(process: int) -> int | None:
    try:
        with open(f"/proc/{process}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # the name may hold anything
    except OSError:
        return None
    return int(fields[1])


def _resident(process: int) -> int:
    try:
        with open(f"/proc/{process}/statm", "rb") as file:
            return int(file.read().split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0
