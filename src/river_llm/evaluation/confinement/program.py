"""What the program's process does to itself before the program begins."""

from __future__ import annotations

import os
import resource
import signal
import sys
from dataclasses import dataclass, field

from . import landlock, libc, syscall_filter

DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")
_SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache")
_OPEN_FILES = 64

# It has come to its end if the exit code says so that is new each time: `sys.exit(0)` half-way is
# no success.
_RUN = """\
import os, sys, traceback
path, code = sys.argv[1], int(sys.argv[2])
sys.argv[:] = [path]
try:
    with open(path, encoding="utf-8", errors="surrogateescape") as file:
        source = file.read()
    exec(compile(source, "program", "exec"), {"__name__": "__main__"})
except BaseException:
    traceback.print_exc()
    code = 1
try:
    sys.stdout.flush()
finally:
    os._exit(code)
"""


@dataclass
class Confinement:
    """How one program is confined.

    Attributes:
        seconds, memory_bytes, processes, file_bytes: see `code_execution.Limits`.
        namespaces, landlock, syscall_filter: whether to use them where the system allows it.
        user: whom the program runs as; None: as this process.
        other_tasks: processes and threads that the kernel counts beside the program's.
        isolation: what is in force, for people to read.
    """

    seconds: float
    memory_bytes: int
    processes: int
    file_bytes: int
    namespaces: bool = True
    landlock: bool = True
    syscall_filter: bool = True
    user: int | None = None
    other_tasks: int = 0
    isolation: dict[str, str] = field(default_factory=dict)


def interpreter() -> str:
    """The program's Python: this one."""
    return os.path.realpath(sys.executable)


def readable_files() -> list[str]:
    """What the interpreter needs."""
    return [*_SYSTEM, os.path.dirname(interpreter()), os.path.realpath(sys.base_prefix)]


def confine(limits: Confinement, output: int) -> None:
    """Put this process under the limits. The working directory is the program's scratch directory.

    Args:
        output: the file that its output goes to.
    """
    os.setsid()
    nothing = os.open("/dev/null", os.O_RDONLY)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    if limits.landlock:
        try:
            landlock.restrict(readable_files(), [os.getcwd(), *DEVICES])
            limits.isolation.setdefault("files", "landlock")
            if landlock.version() >= 6:
                limits.isolation.setdefault("processes", "landlock")
        except OSError:
            pass
    _limit_resources(limits)
    if limits.user is not None:
        os.setgroups([])
        os.setresgid(limits.user, limits.user, limits.user)
        os.setresuid(limits.user, limits.user, limits.user)
        limits.isolation.setdefault("files", "permissions of a user without any")
        limits.isolation.setdefault("processes", "another user")
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    if limits.syscall_filter:
        try:
            syscall_filter.install()
            limits.isolation.setdefault("network", "system calls")
            limits.isolation.setdefault("processes", "system calls")
        except OSError:
            pass
    for name in ("files", "network", "processes"):
        limits.isolation.setdefault(name, "none")


def run(path: str, passed: int) -> None:
    """Become the program at `path`, which exits with `passed` where it runs to its end."""
    python = interpreter()
    os.execve(python, [python, "-I", "-S", "-B", "-c", _RUN, path, str(passed)], {})


def _limit_resources(limits: Confinement) -> None:
    seconds = int(limits.seconds) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, limits.memory_bytes),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, _OPEN_FILES),
        (resource.RLIMIT_NPROC, limits.processes + limits.other_tasks),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        most = min(most, _hard(kind))
        resource.setrlimit(kind, (most, most))


def _hard(kind: int) -> int:
    hard = resource.getrlimit(kind)[1]
    return sys.maxsize if hard == resource.RLIM_INFINITY else hard
