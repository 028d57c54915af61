"""Run the command line, within the test's process or as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from unittest import mock

from river_llm.cli import main

SCRIPT = str(Path(sys.executable).parent / "river-llm")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    exit_code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object that stdout is, strictly: no NaN, one line."""
        assert self.exit_code == 0, self.stderr
        assert self.stdout.count("\n") == 1
        assert self.stdout.endswith("\n")
        output: dict[str, Any] = json.loads(self.stdout, parse_constant=_refuse_constant)
        return output

    def check_fails(self, exit_code: int, *parts: str) -> None:
        """It failed with one line on stderr that has all of `parts`, and printed no answer."""
        assert self.exit_code == exit_code, self.stderr
        assert self.stdout == ""
        assert self.stderr.startswith("river-llm: ")
        assert self.stderr.count("\n") == 1
        assert self.stderr.endswith("\n")
        assert "Traceback" not in self.stderr
        for part in parts:
            assert part in self.stderr


def run(*arguments: object, stdin: str | io.TextIOBase | None = "") -> Outcome:
    """Run `river-llm` with these arguments through `main()`, here; stdin may be closed: None."""
    output, errors = io.StringIO(), io.StringIO()
    typed = io.TextIOWrapper(io.BytesIO(stdin.encode() if isinstance(stdin, str) else b""), "utf-8")
    argv = ["river-llm", *map(str, arguments)]
    exit_code = 0
    with (
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "stdin", typed if isinstance(stdin, str) else stdin),
        mock.patch.dict(os.environ),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as exit_:
            exit_code = exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    return Outcome(exit_code, output.getvalue(), errors.getvalue())


def start(
    *arguments: object,
    python: tuple[str, ...] = (SCRIPT,),
    stdin: int | IO[str] = subprocess.PIPE,
    stdout: int | IO[str] = subprocess.PIPE,
) -> subprocess.Popen[bytes]:
    """Start `river-llm` as a process; `python` are the interpreter's own arguments."""
    return subprocess.Popen(
        [sys.executable, *python, *map(str, arguments)],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env=_environment(),
    )


def run_process(
    *arguments: object, python: tuple[str, ...] = (SCRIPT,), stdin: bytes = b""
) -> Outcome:
    """Run `river-llm` as a process of its own to its end."""
    process = start(*arguments, python=python)
    output, errors = process.communicate(stdin, timeout=120)
    return Outcome(process.returncode, output.decode(), errors.decode())


def _environment() -> Mapping[str, str]:
    """One thread, no Hub, and nothing that makes rich or typer take a pipe for a terminal."""
    terminal = ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TTY_COMPATIBLE", "RIVER_LLM_DEBUG")
    kept = {name: value for name, value in os.environ.items() if name not in terminal}
    return {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "100"}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
