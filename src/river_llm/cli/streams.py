"""stdin, stdout and stderr: text comes in as UTF-8, and goes out whatever the terminal takes."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from river_llm.cli.usage import usage_error
from river_llm.errors import DataError
from river_llm.text.utf8 import decode_text


def escape_what_stdout_lacks() -> None:
    """Have stdout write a character that its encoding lacks as an escape, `\\u6f22`, in place of an
    error, unless the user's environment says what to do."""
    defaults = ("strict", "surrogateescape")  # Python's own
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in defaults:
        sys.stdout.reconfigure(errors="backslashreplace")


def note(text: str) -> None:
    """Print a line on stderr."""
    print(f"river-llm: {text}", file=sys.stderr)


def print_json(output: Mapping[str, Any]) -> None:
    """Print a JSON object in one line of ASCII; numbers that are none become null."""
    print(json.dumps(_finite(output), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def check_stdin() -> None:
    """Validate that there is one.

    Raises:
        typer.Exit: it is closed.
    """
    if sys.stdin is None:
        raise usage_error("standard input is closed; there is nothing to read from it")


def read_stdin() -> str:
    """All of stdin, see `decode_text`.

    Raises:
        typer.Exit: it is closed, can't be read, or is no text.
    """
    check_stdin()
    try:
        return decode_text(sys.stdin.buffer.read(), "stdin")
    except DataError as error:
        raise usage_error(str(error)) from error
    except OSError as error:  # it is open for writing only, for one
        raise usage_error(f"stdin can't be read: {error.strerror or error}") from error


def stdin_lines() -> Iterator[str]:
    """The lines of stdin up to its end or Ctrl-C, without their ends; those that are typed stand
    behind a prompt. Bytes that are no UTF-8 come as lone surrogates.

    Raises:
        typer.Exit: stdin can't be read.
    """
    assert isinstance(sys.stdin, io.TextIOWrapper)
    is_typed = sys.stdin.isatty()
    sys.stdin.reconfigure(errors="surrogateescape")  # one bad line leaves the next ones whole
    if not is_typed:
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline=None)
    while True:
        try:
            line = input("> " if is_typed else "")
        except (EOFError, KeyboardInterrupt):
            return
        except OSError as error:
            raise usage_error(f"stdin can't be read: {error.strerror or error}") from error
        yield line
