"""Text from the outside: UTF-8 with or without byte order mark, and any kind of line break."""

from __future__ import annotations

import codecs
from pathlib import Path

from river_llm.errors import DataError

_OTHER_MARKS = {
    codecs.BOM_UTF32_LE: "UTF-32",  # before UTF-16's, with which it begins
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def decode_text(content: bytes, name: str, fallback: str | None = None) -> str:
    """The text of these bytes, without byte order mark and with `\\n` at the end of every line,
    as Python's universal newlines have it.

    Args:
        name: of where they come from, for errors.
        fallback: the encoding of what is no UTF-8, where the user named one.

    Raises:
        DataError: they are no such text.
    """
    check_encoding(content, name)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if fallback is None:
            raise DataError(
                f"{name} is no UTF-8 text (at byte {error.start}); convert it first"
            ) from error
        try:
            text = content.decode(fallback)
        except (UnicodeError, LookupError) as error:
            raise DataError(
                f"{name} is no text in UTF-8 or {fallback}; convert it first"
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


def check_encoding(content: bytes, name: str) -> None:
    """Validate that bytes may be UTF-8, by how they begin and by what text never has.

    Raises:
        DataError: they are of another encoding, or no text.
    """
    for mark, encoding in _OTHER_MARKS.items():
        if content.startswith(mark):
            raise DataError(f"{name} is {encoding} text; convert it to UTF-8")
    if b"\0" in content:
        if _is_utf16(content):
            raise DataError(f"{name} is UTF-16 text; convert it to UTF-8")
        raise DataError(f"{name} has NUL bytes, which no text has; give UTF-8 text")


def _is_utf16(content: bytes) -> bool:
    """Whether every other byte of most of it is zero, as in European text without a mark."""
    halves = content[::2].count(0), content[1::2].count(0)
    return len(content) > 3 and min(halves) == 0 and 8 * max(halves) > 3 * len(content)
