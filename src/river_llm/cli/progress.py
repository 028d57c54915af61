"""How far a command is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from river_llm.cli.render import stderr

SECONDS = 10.0  # between two lines
ENVIRONMENT_VARIABLE = "RIVER_LLM_PROGRESS"


def _print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class ProgressLines:
    """A line every ten seconds while it is open, where stderr is no terminal; none where the work
    is done sooner, or where RIVER_LLM_PROGRESS is off.

    Attributes:
        description: of the work, in its progressive form.
        done, total: steps of it; a total of 0 is one that isn't known.
    """

    def __init__(self, description: str, write: Callable[[str], None] = _print_line) -> None:
        self.description = description
        self.done = self.total = 0
        self._write = write
        self._start = time.monotonic()
        self._is_over = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin, or go on."""
        if stderr.is_terminal or os.environ.get(ENVIRONMENT_VARIABLE) == "off":
            return
        self._is_over = threading.Event()
        self._thread = threading.Thread(
            target=self._tell, args=(self._is_over,), name="river-llm progress", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Say nothing more, until the next start."""
        self._is_over.set()
        if self._thread is not None:
            self._thread.join(timeout=1)  # it may wait for a reader of stderr
            self._thread = None

    def __enter__(self) -> ProgressLines:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _tell(self, is_over: threading.Event) -> None:
        with suppress(OSError, ValueError, AttributeError):  # nobody reads, or stderr is closed
            while not is_over.wait(SECONDS):
                self._write(self._line())

    def _line(self) -> str:
        steps = f" {self.done} of {self.total}" if self.total else ""
        seconds = round(time.monotonic() - self._start)
        return f"river-llm: {self.description}{steps}, {seconds} s"


class LoadingProgress:
    """What a command does and how far it is, while it is open."""

    def __init__(self, description: str) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
        self._task = self._progress.add_task(description, total=None)
        self._lines = ProgressLines(description)

    def layers_built(self, done: int, total: int) -> None:
        """The river has `done` of `total` exit layers."""
        self.work_done("building the exit river", done, total)

    def steps_done(self, done: int, total: int) -> None:
        """`done` of `total` steps of whatever the description says."""
        self.work_done(self._lines.description, done, total)

    def work_done(self, description: str, done: int, total: int) -> None:
        """`done` of `total` steps of this work."""
        self._lines.description, self._lines.done, self._lines.total = description, done, total
        self._progress.update(self._task, description=description, completed=done, total=total)

    def __enter__(self) -> LoadingProgress:
        self._progress.start()
        self._lines.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.stop()
        self._progress.stop()
