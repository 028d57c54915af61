"""Run a program that a model wrote, without trusting it. Linux only.

Each program is a process of its own in a bare Python (standard library only), with an empty
environment, nothing on stdin and an empty scratch directory, which is deleted afterwards.

What holds everywhere:
    time        a clock, and a limit of processor time; then all its processes are killed
    memory      a limit of address space for each process, and of what all of them hold together
    processes   a limit of their number; as root the program runs as a user of its own, for which
                the kernel keeps that limit (for root it wouldn't). Where that user can't reach the
                interpreter and there are no namespaces, the supervisor counts and kills
    files       a limit of what all written files take, of open files, no core dumps
    leftovers   processes that detach themselves are found and killed too

What the system has to allow, strongest first, each tried and then the next; the result says which
one was in force:
    namespaces  the program sees a root of its own in memory, with the interpreter and the system's
                libraries, read-only, no other processes and no network. As root, or as a user where
                unprivileged user namespaces are allowed
    Landlock    (Linux 5.13) no other files than the interpreter's and the scratch directory; from
                6.7 no TCP; from 6.12 no signals to other processes
    filter      of system calls (x86-64, 64-bit ARM): no sockets, no signals to or looks into other
                processes, no mounts

What this does not stop: a bug in the kernel, which the program shares with the host; a program that
reads the files of the interpreter and of /usr; one that keeps processors busy until its time is
over; one that was written to pass, by finding the exit code that says so. Where neither namespaces
nor Landlock are to be had and the caller isn't root, it could read and write the caller's files.
For code of people who mean harm, run the whole evaluation in a virtual machine.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from river_llm.errors import ConfigError, RiverError

Outcome = Literal["passed", "failed", "timeout", "memory", "processes", "files", "killed"]

_START = """\
import sys
sys.path.append(sys.argv[1])  # last: names of the standard library stay what they are
from confinement.supervisor import main
main()
"""
_GRACE_SECONDS = 20  # to start and to clean up, on a busy machine


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use.

    Attributes:
        seconds: of time, and of the processor's time in each process.
        memory_bytes: address space of each process, and what all of them may hold together.
        processes: and threads, the program's first one among them.
        file_bytes: all that it writes.
    """

    seconds: float = 10.0
    memory_bytes: int = 1 << 29
    processes: int = 8
    file_bytes: int = 1 << 24

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not value > 0:
                raise ConfigError(f"a program's limit of {name} is {value}; give more than 0")


@dataclass(frozen=True, slots=True)
class Confinement:
    """What confines a program beside its limits, each where the system allows it."""

    namespaces: bool = True
    landlock: bool = True
    syscall_filter: bool = True


@dataclass(frozen=True, slots=True)
class ProgramResult:
    """How a program ended.

    Attributes:
        outcome: ``"passed"``: it ran to its end. ``"failed"``: an error, or it left before.
            ``"timeout"``, ``"memory"``, ``"processes"``, ``"files"``: it broke that limit and was
            killed. ``"killed"``: by a signal, as one that uses up memory gets from the kernel.
        output: the last 16 KiB that it printed, errors among it.
        isolation: what kept it from files, network and other processes.
    """

    outcome: Outcome
    output: str
    isolation: dict[str, str]

    @property
    def passed(self) -> bool:
        return self.outcome == "passed"


def run_program(
    program: str, limits: Limits | None = None, confinement: Confinement | None = None
) -> ProgramResult:
    """Run a program, confined; see the module for what that stops and what it doesn't.

    Raises:
        RiverError: programs can't be confined here at all.
    """
    if sys.platform != "linux":
        raise RiverError("programs of a model are run on Linux only; use a container or WSL")
    limits = limits or Limits()
    request = {
        "program": program,
        "limits": {**asdict(limits), **asdict(confinement or Confinement())},
    }
    python = getattr(sys, "_base_executable", None) or sys.executable  # not the environment's
    command = [python, "-I", "-S", "-B", "-c", _START, str(Path(__file__).parent)]
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={},
        cwd="/",
        start_new_session=True,  # Ctrl-C is for this process; it ends the other one
    )
    try:
        answer, errors = process.communicate(
            json.dumps(request).encode(), timeout=limits.seconds + _GRACE_SECONDS
        )
    except BaseException as error:
        _stop(process)
        if isinstance(error, subprocess.TimeoutExpired):
            raise RiverError("the supervisor of a program doesn't answer") from error
        raise
    try:
        result = json.loads(answer)
    except ValueError as error:
        detail = " ".join(errors.decode("utf-8", "replace").split())[-200:]
        raise RiverError(f"programs can't be confined here: {detail or 'no answer'}") from error
    if result["outcome"] == "unable":
        raise RiverError(f"programs can't be confined here: {result['failure']}")
    return ProgramResult(result["outcome"], result["output"], result["isolation"])


def check_confinement() -> dict[str, str]:
    """See that programs run here, and say what confines them.

    Raises:
        RiverError: they don't.
    """
    result = run_program("assert 1 + 1 == 2")
    if not result.passed:
        raise RiverError(f"programs can't be confined here: {result.outcome} {result.output}")
    return result.isolation


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()  # it kills the program and what came out of it
    try:
        process.communicate(timeout=_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
