"""The result of one arm on one task, as JSON lines that grow while it runs.

    {"kind": "run", ...}        what is run: everything that decides over the answers
    {"kind": "part", ...}       one for each time it was started: command, date, versions, machine
    {"kind": "item", ...}       one for each item, in the order in which they were answered
    {"kind": "summary", ...}    the last line, if and only if the run is whole

A run that was cut short has no summary, so it can't be mistaken for a whole one. To go on, the line
that was being written is cut off, and a summary too where more items follow.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from river_llm.errors import ResultFileError

FORMAT_VERSION = 2
_BEGINNING = b'{"kind": "run"'


@dataclass(frozen=True, slots=True)
class Result:
    """What a result file holds.

    Attributes:
        path: where it is.
        run: what was run.
        parts: when and where it ran.
        items: the records of its items, by id.
        summary: None where the run is not whole.
        end: bytes up to the last whole item, or the last part.
    """

    path: Path
    run: Mapping[str, Any]
    parts: list[Mapping[str, Any]] = field(default_factory=list)
    items: dict[int, Mapping[str, Any]] = field(default_factory=dict)
    summary: Mapping[str, Any] | None = None
    end: int = 0


def read_result(path: Path) -> Result:
    """Read a result file, whole or not.

    Raises:
        ResultFileError: it isn't there, is none, or is damaged before its last line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ResultFileError(f"{path} can't be read: {error.strerror or error}") from error
    result: Result | None = None
    end = 0
    lines = data.split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last one is empty, or cut short
        end += len(line) + 1
        try:
            entry = json.loads(line)
            kind = entry.pop("kind")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise ResultFileError(f"{path}, line {number}: this is no line of a result") from error
        if (result is None) != (kind == "run"):
            raise ResultFileError(f"{path}, line {number}: a result begins with its one run")
        if result is None:
            if entry.get("format_version") != FORMAT_VERSION:
                raise ResultFileError(
                    f"{path} has format version {entry.get('format_version')}; "
                    f"this program knows {FORMAT_VERSION}; begin anew with --restart"
                )
            result = Result(path, entry, end=end)
        else:
            result = _with(result, kind, entry, number, end)
    if result is None:
        raise ResultFileError(f"{path} is no result file; give --output another folder")
    if lines[-1]:  # something after the summary: then it doesn't count
        result = _replaced(result, summary=None)
    return result


def read_whole(path: Path, task: str) -> Result:
    """Read the result of a whole run of a task.

    Raises:
        ResultFileError: as `read_result`, and where the run isn't whole or is of another task.
    """
    result = read_result(path)
    check_whole(result)
    if result.run.get("task") != task:
        raise ResultFileError(f"{path} is of the task {result.run.get('task')}, not {task}")
    return result


def check_whole(result: Result) -> None:
    """See that the run came to its end.

    Raises:
        ResultFileError: it didn't.
    """
    if result.summary is None:
        raise ResultFileError(
            f"{result.path} is not whole; the command that began it goes on with it"
        )


def check_same_run(result: Result, run: Mapping[str, Any]) -> None:
    """See that a result is of this very run.

    Raises:
        ResultFileError: it is of another one; the message says what differs.
    """
    differing = _differences(result.run, {"format_version": FORMAT_VERSION, **run})
    if differing:
        raise ResultFileError(
            f"{result.path} is of another run ({'; '.join(differing)}); "
            "give --output another folder, or --restart to begin this one anew"
        )


def _with(result: Result, kind: str, entry: dict[str, Any], number: int, end: int) -> Result:
    """The result with one more line."""
    where = f"{result.path}, line {number}"
    if result.summary is not None:
        raise ResultFileError(f"{where}: nothing may follow the summary")
    if kind == "part":
        result.parts.append(entry)
    elif kind == "item":
        identity = entry.get("id")
        if not isinstance(identity, int) or identity in result.items:
            raise ResultFileError(f"{where}: item {identity!r} has no number, or is there twice")
        result.items[identity] = entry
    elif kind == "summary":
        if entry.get("items") != len(result.items):
            raise ResultFileError(f"{where}: the summary is of {entry.get('items')} items")
        return _replaced(result, summary=entry)  # `end` stays before it
    else:
        raise ResultFileError(f"{where}: there is no kind {kind!r}")
    return _replaced(result, end=end)


def _replaced(result: Result, **fields: Any) -> Result:
    own = {name: getattr(result, name) for name in Result.__dataclass_fields__}
    return Result(**{**own, **fields})


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted({*old, *new}):
        before, now = old.get(name), new.get(name)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            found += _differences(before, now, f"{prefix}{name}.")
        elif before != now:
            found.append(f"{prefix}{name} is {_short(before)} there and {_short(now)} here")
    return found


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


class ResultWriter:
    """Adds to a result file; whatever was written is on the disk when `add_items` returns.

    Only one at a time: a second process gets an error.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], *, restart: bool = False) -> None:
        """Begin a result file, or go on with the one that is there.

        Args:
            restart: begin anew where there is one.

        Raises:
            ResultFileError: the file is of another run, is damaged, is being written by another
                process, or can't be written.
        """
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab")
            _lock(self._file.fileno(), path)
        except OSError as error:
            raise ResultFileError(f"{path} can't be written: {error.strerror or error}") from error
        try:
            if restart:
                self._file.truncate(0)
            first = _first_line(path)
            if not first.endswith(b"\n") and _BEGINNING.startswith(first[: len(_BEGINNING)]):
                self._file.truncate(0)  # new, or cut short in its very first line
                self._write([{"kind": "run", "format_version": FORMAT_VERSION, **run}])
            self._result = read_result(path)
            check_same_run(self._result, run)
        except BaseException:
            self._file.close()
            raise

    @property
    def result(self) -> Result:
        """What was there when it was opened."""
        return self._result

    def begin_part(self, part: Mapping[str, Any]) -> None:
        """Go on: from now on the file is of a run that isn't whole."""
        self._file.truncate(self._result.end)
        self._write([{"kind": "part", **part}])

    def add_items(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records of items, each with its ``id``."""
        self._write([{"kind": "item", **record} for record in records])

    def end(self, summary: Mapping[str, Any]) -> None:
        """Write the summary: the run is whole."""
        self._write([{"kind": "summary", **summary}])

    def _write(self, entries: list[dict[str, Any]]) -> None:
        lines = [json.dumps(entry, ensure_ascii=False, allow_nan=False) for entry in entries]
        text = "".join(f"{line}\n" for line in lines)
        try:
            self._file.write(text.encode("utf-8", "backslashreplace"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise ResultFileError(f"{self.path} can't be written: {error.strerror}") from error

    def __enter__(self) -> ResultWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _first_line(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.readline()


def _lock(descriptor: int, path: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ResultFileError(f"{path} is being written by another process") from error
