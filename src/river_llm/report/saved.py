"""Measurements beside the result files, each taken once, in a file of JSON.

identity    what decides over it, versions among it: a file of another one is replaced
part        when and where it was taken: command, date, versions, processor, cores
measured    what came of it
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_llm.benchmark.environment import describe_run, installed_versions
from river_llm.errors import ResultFileError

Values = dict[str, Any]

_PACKAGES = ("river-llm", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Measurement:
    """What was measured, now or in a run before.

    Attributes:
        values: what came of it.
        part: when and where: command, date, versions, processor, cores; see `describe_run`.
    """

    values: Values
    part: Values


def measured_once(
    path: Path, identity: Mapping[str, Any], measure: Callable[[], Values], restart: bool = False
) -> Values:
    """The values of `measurement`."""
    return measurement(path, identity, measure, restart).values


def measurement(
    path: Path, identity: Mapping[str, Any], measure: Callable[[], Values], restart: bool = False
) -> Measurement:
    """What `measure` gave for this identity, now or in a run before.

    Args:
        identity: all that decides over it, as JSON values; the versions of river-llm, torch and
            transformers are added.
        restart: measure anew.

    Raises:
        ResultFileError: the file can't be written.
    """
    wanted = json.loads(json.dumps({**identity, "versions": installed_versions(_PACKAGES)}))
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if not restart and kept["identity"] == wanted:
            return Measurement(dict(kept["measured"]), dict(kept["part"]))
    except (OSError, ValueError, KeyError, TypeError):  # not there, cut short, or without its part
        pass
    part = describe_run(_PACKAGES)
    text = json.dumps({"identity": wanted, "part": part, "measured": measure()}, indent=1)
    write_whole(path, text + "\n")
    return Measurement(json.loads(text)["measured"], part)


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
