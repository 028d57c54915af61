"""Where the items of a task come from: a file in a directory, else the Hugging Face Hub."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import json
import os
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import huggingface_hub

from river_llm.errors import DataError
from river_llm.evaluation.extras import import_extra
from river_llm.text.utf8 import decode_text

ENVIRONMENT_VARIABLE = "RIVER_LLM_DATA"
_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a data set.

    Attributes:
        fields: what it says.
        place: where it stands, for messages.
    """

    fields: Mapping[str, Any]
    place: str

    def text(self, name: str) -> str:
        """A field that is text; raises DataError."""
        return self._field(name, str, "text")

    def number(self, name: str) -> int:
        """A field that is a whole number; raises DataError."""
        value = self._field(name, int, "a whole number")
        if isinstance(value, bool):
            raise DataError(f"{self.place}: {name} is no whole number")
        return value

    def truth(self, name: str) -> bool:
        """A field that is true or false; raises DataError."""
        return self._field(name, bool, "true or false")

    def texts(self, name: str) -> list[str]:
        """A field that is a list of texts, two or more; raises DataError."""
        values: list[str] = self._field(name, list, "a list")
        if len(values) < 2 or not all(isinstance(value, str) for value in values):
            raise DataError(f"{self.place}: {name} is no list of two texts or more")
        return values

    def place_in(self, name: str, choices: Sequence[object]) -> int:
        """A field that is the place of one of these; raises DataError."""
        place = self.number(name)
        if not 0 <= place < len(choices):
            raise DataError(
                f"{self.place}: {name} is {place}, but there are {len(choices)} choices"
            )
        return place

    def _field(self, name: str, kind: type[_Value], words: str) -> _Value:
        value = self.fields.get(name)
        if not isinstance(value, kind):
            found = "missing" if name not in self.fields else f"no {words.removeprefix('a ')}"
            raise DataError(f"{self.place}: {name} is {found}")
        return value


@dataclass(frozen=True, slots=True)
class HubSource:
    """A split of a data set on the Hub.

    Attributes:
        dataset, config, split: its names there; config ``"*"`` stands for all, joined.
        convert: one of its rows to the fields of a `Record`.
    """

    dataset: str
    config: str | None
    split: str
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict


@dataclass(frozen=True, slots=True)
class DataSource:
    """Where the items of a task are.

    Attributes:
        pattern: of the file's name in the data directory; a `.gz` may follow.
        hub: where they are on the Hub.
        is_several: whether several files may match, which are joined.
    """

    pattern: str
    hub: HubSource
    is_several: bool = False


def data_directory(given: Path | None) -> Path | None:
    """The directory that was given, else that of `$RIVER_LLM_DATA`, else None.

    Raises:
        DataError: it isn't there.
    """
    named = given or os.environ.get(ENVIRONMENT_VARIABLE)
    if not named:
        return None
    directory = Path(named).expanduser()
    if not directory.is_dir():
        raise DataError(f"there is no data directory {directory}; --data-dir names it")
    return directory


def read_records(source: DataSource, directory: Path | None) -> list[Record]:
    """All records of a source, from the directory if there is one, else from the Hub.

    Raises:
        DataError: they aren't there, or can't be read.
        MissingExtraError: they have to come from the Hub, and `datasets` is not installed.
    """
    if directory is None:
        return list(_from_hub(source))
    paths = sorted({*directory.glob(source.pattern), *directory.glob(f"{source.pattern}.gz")})
    if not paths:
        raise DataError(
            f"{directory} has no file {source.pattern}; put it there, or leave out --data-dir to "
            f"get {source.hub.dataset} from the Hub"
        )
    if len(paths) > 1 and not source.is_several:
        names = ", ".join(path.name for path in paths)
        raise DataError(f"{directory} has several files {source.pattern}: {names}; keep one")
    records = [record for path in paths for record in read_json_lines(path)]
    if not records:
        raise DataError(f"{paths[0]} is empty; it should hold one JSON object a line")
    return records


def read_json_lines(path: Path) -> Iterator[Record]:
    """The JSON objects of a file, one a line, empty lines left out.

    Raises:
        DataError: the file can't be read, or a line is no JSON object.
    """
    try:
        data = path.read_bytes()
        content = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    text = decode_text(content, str(path))
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        place = f"{path.name}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: this is no JSON ({error})") from error
        if not isinstance(fields, dict):
            raise DataError(f"{place}: this is no JSON object")
        yield Record(fields, place)


def digest(records: Sequence[Record]) -> str:
    """A name for the content of these records, wherever they stand."""
    found = hashlib.sha256()
    for record in records:
        line = json.dumps(record.fields, sort_keys=True, ensure_ascii=False, default=str)
        found.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return f"sha256:{found.hexdigest()}"


@functools.cache
def _is_hub_reached() -> bool:
    """Whether a connection to the Hub comes about; asked once."""
    request = urllib.request.Request(huggingface_hub.constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except (urllib.error.HTTPError, http.client.HTTPException):  # it answered
        return True
    except OSError as error:  # a certificate is judged by the Hub's client, which has its own
        return isinstance(getattr(error, "reason", error), ssl.SSLError)
    return True


@contextmanager
def _without_retries() -> Iterator[None]:
    """Where the Hub can't be reached, only what is on this machine counts: else `datasets` would
    ask for half a minute, and tell of each time."""
    constants, before = huggingface_hub.constants, huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE = before or not _is_hub_reached()
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _from_hub(source: DataSource) -> Iterator[Record]:
    hub = source.hub
    library = import_extra("datasets", f"the data set {hub.dataset} of the Hub")
    try:
        with _without_retries():
            configs = [hub.config]
            if hub.config == "*":
                configs = sorted(library.get_dataset_config_names(hub.dataset))
            parts = [library.load_dataset(hub.dataset, name, split=hub.split) for name in configs]
    except Exception as error:  # the library and the network have many
        detail = " ".join(str(error).split())[:160]
        raise DataError(
            f"{hub.dataset} can't be had from the Hub ({type(error).__name__}: {detail}); "
            f"without a network, --data-dir names a directory with {source.pattern}"
        ) from error
    rows = (row for part in parts for row in part)
    for number, row in enumerate(rows):
        place = f"{hub.dataset}, row {number}"
        try:
            yield Record(hub.convert(row), place)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise DataError(f"{place}: not as expected ({error!r})") from error
