"""How far a command is, on stderr: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from river_llm.cli.render import stderr
from river_llm.cli.streams import note

SECONDS = 10.0  # between two lines
ENVIRONMENT_VARIABLE = "RIVER_LLM_PROGRESS"


class LoadingProgress:
    """What a command does and how far it is, while it is open. Where stderr is no terminal: a line
    every ten seconds, none where RIVER_LLM_PROGRESS is off."""

    def __init__(self, description: str) -> None:
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=stderr,
            transient=True,
            disable=not stderr.is_terminal,
        )
        self._task = self._bar.add_task(description, total=None)
        self._description, self._steps = description, ""
        self._is_over = threading.Event()
        self._lines = threading.Thread(
            target=self._write_lines, name="river-llm progress", daemon=True
        )

    def layers_built(self, done: int, total: int) -> None:
        """The river has `done` of `total` exit layers."""
        self.phase_done("building the exit river", done, total)

    def text_written(self, done: int, total: int) -> None:
        """The model has written `done` of `total` tokens of each sequence to calibrate on."""
        self.phase_done("writing calibration text", done, total)

    def phase_done(self, description: str, done: int, total: int) -> None:
        """`done` of `total` steps of a part of the work."""
        self._description = description
        self.steps_done(done, total)

    def steps_done(self, done: int, total: int) -> None:
        """`done` of `total` steps of the work."""
        self._steps = f" {done} of {total}"
        self._bar.update(self._task, description=self._description, completed=done, total=total)

    def __enter__(self) -> LoadingProgress:
        self._bar.start()
        if not stderr.is_terminal and os.environ.get(ENVIRONMENT_VARIABLE) != "off":
            self._lines.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        if self._lines.is_alive():
            self._lines.join(timeout=1)  # it may wait for a reader of stderr
        self._bar.stop()

    def _write_lines(self) -> None:
        start = time.monotonic()
        with suppress(OSError, ValueError, AttributeError):  # nobody reads, or stderr is closed
            while not self._is_over.wait(SECONDS):
                seconds = round(time.monotonic() - start)
                note(f"{self._description}{self._steps}, {seconds} s")
