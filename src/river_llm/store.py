"""The store: folders on disk that save time at the next start, and writing whole or not at all.

There is one folder for a model and river, or for a GGUF file that was converted. Its manifest says
what it was made from, as that was then, and has a digest of each of its files. Nothing here is
needed: where a folder can't be written, read or trusted, what it was made from is read instead.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from river_llm.errors import RiverError

ENVIRONMENT_VARIABLE = "RIVER_LLM_CACHE"
MANIFEST_NAME = "river-llm-copy.json"
STAGING_PREFIX = ".writing-"
_STAGING_LIFETIME = 24 * 60 * 60  # seconds; what is older was left by a process that was killed
# The place can't be used, beside a process that writes at the same time.
_UNUSABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT),
    *(errno.EEXIST, errno.ENOTDIR),
)
_HEADER_BYTES, _SAMPLES, _SAMPLE_BYTES = 2**20, 64, 4096

_log = logging.getLogger(__name__)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """A place to write a file or a folder to, which replaces `path` at the end, once it is on the
    disk; after an error `path` is what it was.

    The files can be read by whom the replaced file could be read, or new files can.

    Raises:
        OSError: it can't be written, or there is no folder to write it in.
    """
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=path.parent))
    new, old = staging / "new", staging / "old"
    try:
        yield new
        new_file = staging / "file"
        new_file.touch()
        mode = (path if path.is_file() else new_file).stat().st_mode
        for file in [new] if new.is_file() else _files(new):
            file.chmod(mode)  # some writers let their owner alone read them
            with file.open("r+b") as opened:
                os.fsync(opened.fileno())
        if path.is_dir():
            path.rename(old)
        new.replace(path)
    finally:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(staging, ignore_errors=True)


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
    """One folder of the store; it need not have been written yet.

    Attributes:
        directory: where it is, whatever state its sources are in.
        kind: ``"converted"`` or ``"repacked"``.
        source: the file or folder of the model that it is made from.
        form: how it holds the model: of a converted one the dtype, of a repacked one the widths.
        origin: all that decides over its content, as JSON values.
        river: the folder of the river that it holds too, if that was saved.
    """

    directory: Path
    kind: str
    source: Path
    form: str
    origin: Any
    river: Path | None = None

    @classmethod
    def of(
        cls, kind: str, source: Path, form: str, origin: Any, river: Path | None = None
    ) -> CachedFolder | None:
        """The one for these, see the attributes; None where the cache is off."""
        parent = cache_directory()
        if parent is None:
            return None
        source, river = source.resolve(), river and river.resolve()
        key = hashlib.sha256(json.dumps([str(source), form, river and str(river)]).encode())
        directory = parent / f"{source.name[:100]}-{form}-{key.hexdigest()[:16]}"
        return cls(directory, kind, source, form, origin, river)

    @classmethod
    def at(cls, directory: Path) -> CachedFolder:
        """The one in a folder, damaged or not, by its manifest.

        Raises:
            OSError, ValueError: there is none, or it is no manifest.
        """
        manifest = _manifest(directory)
        try:
            source, river = Path(manifest["source"]), manifest["river"]
            kind, form = str(manifest["kind"]), str(manifest["form"])
            return cls(directory, kind, source, form, manifest["origin"], river and Path(river))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{directory / MANIFEST_NAME} is no manifest of the store") from error

    @property
    def num_bytes(self) -> int:
        """Bytes of its files."""
        return sum(path.stat().st_size for path in _files(self.directory))

    def is_whole(self) -> bool:
        """Whether it is there, made from its sources as they are now, and each file has the size
        and the samples that were written."""
        try:
            files = _manifest(self.directory)["files"].items()
            return CachedFolder.at(self.directory) == self and all(
                file_digest(self.directory / name) == digest for name, digest in files
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def keep(self, num_bytes: int, fill: Callable[[Path], object]) -> None:
        """Write it, of about so many bytes, in place of what was made from the same sources before
        they changed, and remove what was made from sources that are gone, or left half written.

        Never fails: without it the next start takes longer, and that is all. A place that can't be
        written is told once in a process.

        Args:
            fill: writes the files into the folder that it is given.
        """
        parent = self.directory.parent
        try:
            parent.mkdir(parents=True, exist_ok=True)
            if shutil.disk_usage(parent).free < 2 * num_bytes:
                reason = "it would take more than half of the space that is left"
                raise OSError(errno.ENOSPC, reason)
            for path in parent.glob(f"{STAGING_PREFIX}*"):
                with suppress(FileNotFoundError):  # another process has removed it
                    if time.time() - path.stat().st_mtime > _STAGING_LIFETIME:
                        shutil.rmtree(path, ignore_errors=True)
            with atomic_write(self.directory) as new:
                new.mkdir()
                fill(new)
                manifest = {
                    **{"kind": self.kind, "source": str(self.source), "form": self.form},
                    **{"origin": self.origin, "river": self.river and str(self.river)},
                    "files": {
                        path.relative_to(new).as_posix(): file_digest(path) for path in _files(new)
                    },
                }
                (new / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
            for other in cached_folders():
                if not (other.source.exists() and (other.river or other.source).exists()):
                    other.remove()
        except Exception as error:
            _log.info("%s is not kept in %s: %s", self.source, parent, error)
            if isinstance(error, OSError) and error.errno in _UNUSABLE:
                _warn(parent, error.strerror)

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


@cache
def _warn(parent: Path, reason: str) -> None:
    """Once in a process."""
    _log.warning(
        f"nothing can be kept in the cache {parent} ({reason}), so that every start takes as long "
        f"as the first; set {ENVIRONMENT_VARIABLE} to a folder that can be written, or to off"
    )


def cached_folders() -> list[CachedFolder]:
    """All folders in the store by name, the damaged ones that still have a manifest too."""
    found = []
    for directory in _directories():
        with suppress(OSError, ValueError):
            found.append(CachedFolder.at(directory))
    return found


def clear_cache() -> None:
    """Delete every folder of the store, half written and damaged ones too, as far as the system
    allows it."""
    parent = cache_directory()
    if parent is not None:
        for directory in [*_directories(), *parent.glob(f"{STAGING_PREFIX}*")]:
            shutil.rmtree(directory, ignore_errors=True)


def file_state(file: Path) -> list[Any]:
    """Of a file that something is made from: its digest, and when it was last changed.

    Raises:
        OSError: the file can't be read.
    """
    return [file_digest(file), file.stat().st_mtime_ns]


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


def _files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def _directories() -> list[Path]:
    """The folders' own by name; what else is in the cache is somebody's."""
    parent = cache_directory()
    if parent is None:
        return []
    manifests = sorted(parent.glob(f"[!.]*-{16 * '[0-9a-f]'}/{MANIFEST_NAME}"))
    return [path.parent for path in manifests]


def _manifest(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = json.loads((directory / MANIFEST_NAME).read_text(encoding="utf-8"))
    return manifest
