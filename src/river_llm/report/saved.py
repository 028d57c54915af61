"""Measurements beside the result files: kept with what decides over them, and taken once."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from river_llm.errors import ResultFileError

Values = dict[str, Any]


def measured_once(
    path: Path, identity: Mapping[str, Any], measure: Callable[[], Values], restart: bool = False
) -> Values:
    """What `measure` gave for this identity, now or in a run before.

    Args:
        identity: all that decides over it, as JSON values. A file of another one is replaced.
        restart: measure anew.

    Raises:
        ResultFileError: the file can't be written.
    """
    wanted = json.loads(json.dumps(identity))
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not restart and kept["identity"] == wanted:
            return dict(kept["measured"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or cut short
        pass
    measured = measure()
    write_whole(path, json.dumps({"identity": wanted, "measured": measured}, indent=1) + "\n")
    return dict(json.loads(json.dumps(measured)))


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that under its name it is whole, or what it was before.

    Raises:
        ResultFileError: it can't be written.
    """
    make_folder(path.parent)
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        aside.write_bytes(data)
        aside.replace(path)
    except OSError as error:
        with suppress(OSError):
            aside.unlink()
        raise ResultFileError(f"{path} can't be written: {error.strerror or error}") from error


def make_folder(folder: Path) -> None:
    """Make a folder where there is none.

    Raises:
        ResultFileError: it can't be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultFileError(f"{folder} can't be written: {error.strerror or error}") from error
