"""Another process that keeps one core busy, as neighbours on a shared machine do."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_BUSY = """
import os, sys
core, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, [core])
print(flush=True)
while os.getppid() == parent:  # it never outlives the benchmark
    pass
"""


def can_disturb() -> bool:
    """Whether this system lets a process be pinned to a core."""
    return hasattr(os, "sched_setaffinity")


def disturbed_core() -> int:
    """The core that is kept busy: the last of those that this process may use."""
    return max(os.sched_getaffinity(0))


@contextmanager
def busy_core(core: int) -> Iterator[None]:
    """Keep `core` busy as long as this is open."""
    command = [sys.executable, "-c", _BUSY, str(core), str(os.getpid())]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it is on its core now
            yield
        finally:
            process.kill()
