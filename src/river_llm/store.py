"""The cache on disk: folders that save time at the next start, each made from files elsewhere.

A folder is written aside and then renamed, so that under its name it is whole or not there; one
that was damaged later is told by the digests in its manifest. Nothing here is needed: where a
folder can't be written, read or trusted, what it was made from is read in its place.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from river_llm.errors import RiverError

ENVIRONMENT_VARIABLE = "RIVER_LLM_CACHE"
MANIFEST_NAME = "river-llm-copy.json"
STAGING_PREFIX = ".writing-"
_STAGING_LIFETIME = 24 * 60 * 60  # seconds; what is older was left by a process that was killed
_UNUSABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT)
_told: set[Path] = set()  # folders in which nothing can be kept
_HEADER_BYTES, _SAMPLES, _SAMPLE_BYTES = 2**20, 64, 4096

_log = logging.getLogger(__name__)


def cache_directory() -> Path | None:
    """Where the folders are: `$RIVER_LLM_CACHE`, or `river-llm` in `$XDG_CACHE_HOME` or `~/.cache`.

    None where `RIVER_LLM_CACHE=off`, or where there is no home directory.
    """
    chosen = os.environ.get(ENVIRONMENT_VARIABLE)
    if chosen == "off":
        return None
    try:
        if chosen:
            return Path(chosen).expanduser().absolute()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "river-llm"
    except RuntimeError:  # there is no home directory
        return None


@dataclass(frozen=True, slots=True)
class CachedFolder:
    """One folder of the cache; it need not have been written yet.

    Attributes:
        directory: where it is.
        kind: what it is, ``"converted"`` or ``"packed"``.
        source: the file or folder of the model that it is made from.
        form: how it holds the model: of a converted one the dtype, of a packed one the widths.
        beside: the folder of the river that it holds too, if that was saved.
    """

    directory: Path
    kind: str
    source: Path
    form: str
    beside: Path | None = None

    @classmethod
    def at(cls, directory: Path) -> CachedFolder:
        """The one in a folder, damaged or not, by its manifest.

        Raises:
            OSError, ValueError: there is none, or it is no manifest.
        """
        manifest = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
        try:
            beside = manifest["beside"]
            return cls(
                directory,
                str(manifest["kind"]),
                Path(manifest["source"]),
                str(manifest["form"]),
                beside and Path(beside),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{directory / MANIFEST_NAME} is no manifest of the cache") from error

    @property
    def num_bytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in _files(self.directory))

    def is_whole(self) -> bool:
        """Whether it is there, and each file has the size and the samples that were written."""
        try:
            manifest = json.loads((self.directory / MANIFEST_NAME).read_text(encoding="utf-8"))
            files = manifest["files"].items()
            return all(file_digest(self.directory / name) == digest for name, digest in files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def keep(self, num_bytes: int, fill: Callable[[Path], object]) -> None:
        """Write it, of about so many bytes, and remove what was made of the same sources in the
        same form before they changed, or of sources that are gone, and what was left half written.

        Never fails: without it the next start takes longer, and that is all. A folder that can't be
        written is told once in a process.

        Args:
            fill: writes the files into the folder that it is given.
        """
        parent = self.directory.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(parent).free
        except OSError as error:
            _warn_of_unusable(parent, error.strerror or str(error))
            return
        if free < 2 * num_bytes:
            _warn_of_unusable(parent, "it would take more than half of the space that is left")
            return
        try:
            for path in parent.glob(f"{STAGING_PREFIX}*"):
                with suppress(FileNotFoundError):  # another process has removed it
                    if time.time() - path.stat().st_mtime > _STAGING_LIFETIME:
                        shutil.rmtree(path, ignore_errors=True)
            self._write(fill)
            for other in cached_folders():
                sources = [source for source in (other.source, other.beside) if source is not None]
                is_gone = not all(source.exists() for source in sources)
                is_older = other == replace(self, directory=other.directory) and other != self
                if is_older or is_gone:
                    other.remove()
        except Exception as error:
            _log.info("no copy of %s is kept in %s: %s", self.source, parent, error)
            if isinstance(error, OSError) and error.errno in _UNUSABLE:
                _warn_of_unusable(parent, error.strerror or str(error))

    def read(self, read: Callable[[Path], Any]) -> Any:
        """What `read` makes of the folder; None where it isn't there or isn't whole, or where
        `read` fails: it is removed then.

        Raises:
            RiverError, MemoryError: as `read` does, for reasons beside the folder.
        """
        if not self.is_whole():
            return None
        try:
            return read(self.directory)
        except (RiverError, MemoryError):
            raise
        except Exception as error:  # whatever is wrong with it, the source is still there
            _log.info("removing %s, which can't be read: %s", self.directory, error)
            self.remove()
            return None

    def remove(self) -> None:
        """Delete its folder, as far as the system lets go of files that a process has mapped."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _write(self, fill: Callable[[Path], object]) -> None:
        """Write it, whole or not at all; one that another process has written meanwhile stays."""
        staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=self.directory.parent))
        try:
            fill(staging)
            manifest = {
                "kind": self.kind,
                "source": str(self.source),
                "form": self.form,
                "beside": self.beside and str(self.beside),
                "files": {
                    path.relative_to(staging).as_posix(): file_digest(path)
                    for path in _files(staging)
                },
            }
            (staging / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            for path in _files(staging):
                with path.open("r+b") as opened:
                    os.fsync(opened.fileno())  # on the disk before the name that says it is whole
            if not self.is_whole():
                self.remove()
                staging.rename(self.directory)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _warn_of_unusable(directory: Path, reason: str) -> None:
    """Once in a process for each folder."""
    if directory in _told:
        return
    _told.add(directory)
    _log.warning(
        "nothing can be kept in the cache %s (%s), so that every start takes as long as the first; "
        "set %s to a folder that can be written, or to off",
        directory,
        reason,
        ENVIRONMENT_VARIABLE,
    )


def folder_for(
    kind: str, name: str, source: Path, form: str, origin: Any, beside: Path | None = None
) -> CachedFolder | None:
    """The folder of what is made from a source as it is now, whether it is there or not.

    Args:
        name: of the source, which the folder is named after.
        origin: all that decides over its content, as JSON values; a digest of it is in the name.

    Returns:
        None where the cache is off.
    """
    parent = cache_directory()
    if parent is None:
        return None
    key = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
    directory = parent / f"{name[:100]}-{form}-{key}"
    return CachedFolder(directory, kind, source.resolve(), form, beside and beside.resolve())


def cached_folders() -> list[CachedFolder]:
    """All folders in the cache by name, the damaged ones that still have a manifest too."""
    folders = map(_folder_at, _directories())
    return [folder for folder in folders if folder is not None]


def _directories() -> list[Path]:
    """The folders' own by name; what else is in the cache is somebody's."""
    parent = cache_directory()
    if parent is None:
        return []
    manifests = sorted(parent.glob(f"[!.]*-{16 * '[0-9a-f]'}/{MANIFEST_NAME}"))
    return [path.parent for path in manifests]


def clear_cache() -> None:
    """Delete every folder of the cache, half written and damaged ones too, as far as the system
    allows it."""
    parent = cache_directory()
    if parent is None or not parent.is_dir():
        return
    for directory in [*_directories(), *parent.glob(f"{STAGING_PREFIX}*")]:
        shutil.rmtree(directory, ignore_errors=True)


def file_state(file: Path) -> list[Any]:
    """Of a file that something is made from: its digest, and when it was last changed.

    Raises:
        OSError: the file can't be read.
    """
    return [file_digest(file), file.stat().st_mtime_ns]


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _folder_at(directory: Path) -> CachedFolder | None:
    try:
        return CachedFolder.at(directory)
    except (OSError, ValueError):
        return None


def file_digest(file: Path) -> str:
    """Of a file's size, its first MiB and 64 samples over all of it, its last bytes among them.

    Costs milliseconds, whatever the size. Finds a file that is cut short and blocks that never
    reached the disk, and mostly other weights; not a change between the samples, for which the time
    of the file's last change has to be looked at too.

    Raises:
        OSError: the file can't be read.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as opened:
        digest.update(opened.read(_HEADER_BYTES))
        for sample in range(_SAMPLES):
            opened.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
            digest.update(opened.read(_SAMPLE_BYTES))
    return digest.hexdigest()
