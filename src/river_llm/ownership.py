"""What belongs to the process that made it, and is not to be copied.

A forked child has none of the threads that compute, and would wait for them for ever. PyTorch's
own are lost likewise, whatever it is asked to compute.
"""

from __future__ import annotations

import os
from threading import RLock
from typing import Any, NoReturn

from river_llm.errors import RiverError


class NotCopied:
    """What belongs to one model, thread or process: a copy of it would run the original's."""

    why_not_copied = (
        "a model can't be copied or pickled with a river on it; call detach_river(model) first, "
        "and attach the river to the copy"
    )

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise RiverError(self.why_not_copied)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise RiverError(self.why_not_copied)


class NotCopiedEngine(NotCopied):
    """An engine, or what holds one."""

    why_not_copied = (
        "a RiverLM and its engine can't be copied or pickled; load another one, and one in each "
        "process"
    )


class ProcessLock(NotCopiedEngine):
    """A lock of the threads of one process; whoever holds it may take it again."""

    def __init__(self, what: str = "engine") -> None:
        """`what` it guards, for an error."""
        self._what = what
        self._process = os.getpid()
        self._lock = RLock()

    def check_process(self) -> None:
        """Validate that this is the process that made it.

        Raises:
            RiverError: it is a fork of it, where a thread that held the lock would never give it
                back.
        """
        if os.getpid() != self._process:
            raise RiverError(
                f"this {self._what} belongs to the process that made it; make another one after a "
                'fork, and start processes by "spawn" where PyTorch has computed before'
            )

    def acquire_at_once(self) -> bool:
        """Take it if no other thread holds it, and this is its process."""
        return os.getpid() == self._process and self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Let another thread have it."""
        self._lock.release()

    def __enter__(self) -> None:
        """Wait for it; errors as of `check_process`."""
        self.check_process()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()
