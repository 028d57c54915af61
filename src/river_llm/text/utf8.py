"""Text from the outside: UTF-8 with or without byte order mark, and any kind of line break."""

from __future__ import annotations

from pathlib import Path

from river_llm.errors import DataError


def decode_text(content: bytes, name: str) -> str:
    """The text of these bytes, without byte order mark and with `\\n` at the end of every line,
    as Python's universal newlines have it.

    Args:
        name: of where they come from, for errors.

    Raises:
        DataError: they are no UTF-8, or have NUL bytes, as UTF-16 has.
    """
    if b"\0" in content:
        raise DataError(f"{name} has NUL bytes, as UTF-16 has; convert it to UTF-8 text")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name} is no UTF-8 text (at byte {error.start}); convert it first"
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_text(path: Path) -> str:
    """A file's text, see `decode_text`.

    Raises:
        DataError: the file can't be read, or holds no such text.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} can't be read as text: {error.strerror or error}") from error
    return decode_text(content, str(path))
