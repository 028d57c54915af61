"""Runs one untrusted program under limits, and tells how it ended.

A process of its own: it reads one request from stdin and writes one answer to stdout, both JSON.
Below it stands a guard, the first process of the new namespaces, and below that the program:

    supervisor     waits, watches memory, files and the number of processes, kills
      guard        makes the file system, waits for the program
        program    under resource limits, Landlock and the filter of system calls
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import stat
import sys
import tempfile
import time
from typing import Any

from . import libc, namespaces, process_tree
from .program import DEVICES, Confinement, confine, interpreter, readable_files, run

_POLL_SECONDS = 0.03
_OUTPUT_BYTES = 1 << 14
_SHARED_BYTES = 64 << 20  # of the interpreters' pages, which are counted for each process
_FIRST_USER, _USERS = 40_000, 20_000  # ids that belong to nobody on common systems


def main() -> None:
    """Answer the request on stdin."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    libc.prctl(libc.PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _end)
    request = json.load(sys.stdin)
    limits = Confinement(**request["limits"])
    folder = tempfile.mkdtemp(prefix="river-llm-program-")
    try:
        os.chmod(folder, 0o711)
        answer = _supervise(request["program"], limits, folder)
    finally:
        process_tree.kill_descendants()
        shutil.rmtree(folder, ignore_errors=True)
    json.dump(answer, sys.stdout)


def _end(*_: object) -> None:
    sys.exit(1)


def _supervise(program: str, limits: Confinement, folder: str) -> dict[str, Any]:
    in_namespaces = limits.namespaces and namespaces.enter_namespaces()
    passed = 2 + os.urandom(1)[0] % 100
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as output:
        guard = os.fork()
        if guard == 0:
            os.close(reading)
            with _reporting(writing):
                _guard(program, limits, folder, in_namespaces, writing, output.fileno(), passed)
        os.close(writing)
        broken, said = _watch(limits, folder, reading)
        with contextlib.suppress(ProcessLookupError):
            os.kill(guard, signal.SIGKILL)  # a namespace's other processes end with its first
        process_tree.kill_descendants()
        end = output.seek(0, os.SEEK_END)
        output.seek(max(0, end - _OUTPUT_BYTES))
        tail = output.read().decode("utf-8", "replace")
    return {
        "outcome": broken or _outcome(said, passed),
        "output": tail,
        "isolation": said.get("isolation", {}),
        "failure": said.get("failure"),
    }


def _watch(limits: Confinement, folder: str, pipe: int) -> tuple[str | None, dict[str, Any]]:
    """Wait for the program to end or to break a limit; that limit, and what was said of it."""
    deadline = time.monotonic() + limits.seconds
    lines, broken = b"", None
    while broken is None:
        if select.select([pipe], [], [], _POLL_SECONDS)[0]:
            data = os.read(pipe, 4096)
            lines += data
            if not data or b'"status"' in lines:
                break
        processes = process_tree.descendants()
        if time.monotonic() > deadline:
            broken = "timeout"
        elif len(processes) > limits.processes + 1:  # the guard is one
            broken = "processes"
        elif process_tree.resident_bytes(processes) > limits.memory_bytes + _SHARED_BYTES:
            broken = "memory"
        elif _bytes_below(folder) > limits.file_bytes:
            broken = "files"
    said: dict[str, Any] = {}
    for line in lines.splitlines():
        with contextlib.suppress(ValueError):  # cut short
            said.update(json.loads(line))
    return broken, said


def _outcome(said: dict[str, Any], passed: int) -> str:
    if "failure" in said:
        return "unable"
    status = said.get("status")
    if status is None:
        return "killed"
    if os.WIFSIGNALED(status):
        return "timeout" if os.WTERMSIG(status) == signal.SIGXCPU else "killed"
    return "passed" if os.WEXITSTATUS(status) == passed else "failed"


def _guard(
    program: str,
    limits: Confinement,
    folder: str,
    in_namespaces: bool,
    pipe: int,
    output: int,
    passed: int,
) -> None:
    """Make the program's file system, start it, wait for it, and tell how it ended."""
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    user = _unused_user() if os.getuid() == 0 else None
    # a user namespace of its own counts the supervisor and the guard
    limits.other_tasks = 2 if in_namespaces else process_tree.tasks_of_user(os.getuid())
    own_root = False
    if in_namespaces:
        limits.isolation.update(network="own namespace", processes="own namespace")
        own_root = _own_root(folder, limits)
    work = "/work" if own_root else os.path.join(folder, "work")
    os.mkdir(work, 0o700)
    os.chdir(work)
    with open("program.py", "w", encoding="utf-8", errors="surrogateescape") as file:
        file.write(program)
    if user is not None and (own_root or _others_may_run(interpreter())):
        limits.user, limits.other_tasks = user, 0
        for path in (".", "program.py"):
            os.chown(path, user, user)
    child = os.fork()
    if child == 0:
        with _reporting(pipe):
            confine(limits, output)
            _say(pipe, isolation=limits.isolation)
            run("program.py", passed)
    os.close(output)
    while True:
        process, status = os.wait()
        if process == child:
            _say(pipe, status=status)
            os._exit(0)


def _own_root(folder: str, limits: Confinement) -> bool:
    try:
        namespaces.enter_root(folder, readable_files(), DEVICES, limits.file_bytes)
    except OSError:
        return False
    limits.isolation["files"] = "own root"
    return True


@contextlib.contextmanager
def _reporting(pipe: int) -> Any:
    """What a forked process runs: it never comes back, and an error is told to the supervisor."""
    try:
        yield
    except BaseException as error:
        _say(pipe, failure=f"{type(error).__name__}: {error}")
    finally:
        os._exit(1)


def _say(pipe: int, **what: object) -> None:
    os.write(pipe, json.dumps(what).encode() + b"\n")


def _unused_user() -> int:
    """A user without any process, so that the limit of processes is this program's alone."""
    taken = set()
    for process in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            taken.add(os.stat(f"/proc/{process}").st_uid)
    start = int.from_bytes(os.urandom(4), "big")
    users = (_FIRST_USER + (start + i) % _USERS for i in range(_USERS))
    return next(user for user in users if user not in taken)


def _others_may_run(path: str) -> bool:
    """Whether a user without any rights reaches a file."""
    if not os.stat(path).st_mode & stat.S_IXOTH:
        return False
    folder = os.path.dirname(path)
    while folder != "/":
        if not os.stat(folder).st_mode & stat.S_IXOTH:
            return False
        folder = os.path.dirname(folder)
    return True


def _bytes_below(folder: str) -> int:
    """What the files of a folder take; 0 where it is hidden behind a file system in memory."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_blocks * 512
    return total
