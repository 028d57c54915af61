"""stdin, stdout and stderr: text comes in as UTF-8, and goes out whatever the terminal takes."""

from __future__ import annotations

import codecs
import io
import json
import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from river_llm.cli.usage import is_text, usage_error
from river_llm.errors import DataError
from river_llm.text.utf8 import check_encoding, decode_text


class Replacement:
    """Writes `?` where stdout's encoding lacks a character, in place of an error; bytes of file
    names go out as they are.

    Attributes:
        was_needed: whether a character was lacking.
    """

    _NAME = "river_llm.replace"

    def __init__(self) -> None:
        self.was_needed = False
        codecs.register_error(self._NAME, self._replace)
        if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in _DEFAULT_ERRORS:
            sys.stdout.reconfigure(errors=self._NAME)

    def _replace(self, error: UnicodeError) -> tuple[str | bytes, int]:
        assert isinstance(error, UnicodeEncodeError)
        try:
            return codecs.lookup_error("surrogateescape")(error)
        except UnicodeEncodeError:
            self.was_needed = True
            return "?" * (error.end - error.start), error.end


_DEFAULT_ERRORS = ("strict", "surrogateescape")  # Python's own; any other was chosen


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
    """All of stdin, see `decode_text`; what is no UTF-8 is read in the encoding that the user's
    locale names.

    Raises:
        typer.Exit: it is closed, can't be read, or is no text.
    """
    check_stdin()
    with _readable_stdin():
        if isinstance(sys.stdin, io.TextIOWrapper):
            return decode_text(sys.stdin.buffer.read(), "stdin", _named_encoding())
        return decode_text(sys.stdin.read().encode("utf-8", "surrogateescape"), "stdin")


class StdinLines:
    """The lines of stdin, one at a time; those that are typed stand behind a prompt."""

    def __init__(self) -> None:
        self._fallback = _named_encoding()
        self._is_typed = sys.stdin.isatty()
        if not isinstance(sys.stdin, io.TextIOWrapper):
            return
        sys.stdin.reconfigure(errors="surrogateescape")  # one bad line leaves the next ones whole
        if not self._is_typed:
            sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline=None)

    def read(self) -> str | None:
        """The next line without its end; None at the end of the input. Bytes that are no text
        come as lone surrogates.

        Raises:
            typer.Exit: stdin can't be read, or is UTF-16.
        """
        with _readable_stdin():
            if self._is_typed:
                return input("> ")
            line = sys.stdin.readline()
            content = line.encode("utf-8", "surrogateescape")
            check_encoding(content, "stdin")
        if self._fallback is not None and not is_text(line):
            line = content.decode(self._fallback, "surrogateescape")
        return line.removesuffix("\n") if line else None


def _named_encoding() -> str | None:
    """The encoding of stdin where it is not one that UTF-8 contains."""
    encoding = getattr(sys.stdin, "encoding", None) or "utf-8"
    return None if codecs.lookup(encoding).name in ("utf-8", "ascii") else encoding


@contextmanager
def _readable_stdin() -> Iterator[None]:
    """Validate that reading stdin works, within.

    Raises:
        typer.Exit: it can't be read, or is no text.
    """
    try:
        yield
    except DataError as error:
        raise usage_error(str(error)) from error
    except UnicodeError as error:
        raise usage_error("stdin is no UTF-8 text; convert it first") from error
    except OSError as error:  # it is open for writing only, for one
        raise usage_error(f"stdin can't be read: {error.strerror or error}") from error
