"""A saved river's folder: what `river.json` holds, and whether a folder is a river's."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from river_llm.config import BITS, RiverConfig
from river_llm.errors import ConfigError, RiverFileError
from river_llm.store import STAGING_PREFIX

FORMAT_VERSION = 3
_READABLE = (2, 3)  # version 2 has one width for all matrices
MANIFEST_NAME = "river.json"
TENSORS_NAME = "river.safetensors"
TUNED_NAME = "tuned.json"  # see `tuned`
_OLD_NAME = "drafts.json"  # version 0.2.0 kept there what it had learnt about drafts

_MANIFEST_FIELDS = {
    "model_type": str,
    "num_layers": int,
    "linears": list,
    "fingerprint": str,
    "tensor_bytes": int,
    "tensor_digest": str,
}


def read_manifest(directory: Path) -> dict[str, Any]:
    """What `river.json` says, its config as a `RiverConfig` and the bits of every matrix.

    Raises:
        RiverFileError: there is none, it is damaged, or of another format version.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        raise RiverFileError(
            f"{directory} holds no {MANIFEST_NAME}; build a river there: "
            f"river-llm build MODEL -o {directory}"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        version = manifest["format_version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RiverFileError(
            f"{path} is cut short, or no river's manifest; "
            "build it again: river-llm build MODEL -o DIR"
        ) from error
    if version not in _READABLE:
        raise RiverFileError(
            f"{path} is of format version {version}, this release reads {FORMAT_VERSION}; "
            "build it again: river-llm build MODEL -o DIR"
        )
    try:
        manifest["config"] = RiverConfig.of(manifest["config"])
        for key, kind in _MANIFEST_FIELDS.items():
            if not isinstance(manifest[key], kind) or manifest[key] in (0, [], ""):
                raise TypeError(key)
        if not isinstance(manifest.get("source", ""), str):
            raise TypeError("source")
        manifest["bits"] = _saved_bits(manifest)
    except (ConfigError, KeyError, TypeError) as error:
        raise RiverFileError(
            f"{path} is damaged ({error}); build it again: river-llm build MODEL -o DIR"
        ) from error
    return manifest


def _saved_bits(manifest: dict[str, Any]) -> list[str]:
    """Of each layer, the bits of each of `linears`, a digit each."""
    width, num_linears = manifest["config"].bits, len(manifest["linears"])
    if width != "auto":
        return [str(width) * num_linears] * manifest["num_layers"]
    bits: list[str] = manifest["bits"]
    layer = re.compile(f"[{''.join(map(str, BITS))}]{{{num_linears}}}")
    if len(bits) != manifest["num_layers"] or not all(map(layer.fullmatch, bits)):
        raise TypeError("bits")
    return bits


def check_place(directory: Path) -> None:
    """Validate that a river may be written to `directory`, which is absolute.

    Raises:
        RiverFileError: something else than a river is there, or nothing can be written there.
        OSError: it can't be looked at.
    """
    if directory.is_dir():
        others = sorted(entry.name for entry in directory.iterdir() if not _is_of_river(entry))
        if others:
            raise RiverFileError(
                f"{directory} exists and holds other files than a river's, as {others[0]}, which "
                "would be lost; choose a new directory"
            )
    elif directory.exists():
        raise RiverFileError(f"{directory} exists and is a file; choose a new directory")
    parent = next(path for path in directory.parents if path.exists())
    if not parent.is_dir():
        raise RiverFileError(f"{parent} is a file, so there can be no {directory}; choose another")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RiverFileError(f"{parent} can't be written to; choose another place for the river")


def _is_of_river(entry: Path) -> bool:
    """Whether something in a river's folder is the river's own."""
    own = (MANIFEST_NAME, TENSORS_NAME, TUNED_NAME, _OLD_NAME)
    return entry.name in own or entry.name.startswith(STAGING_PREFIX)
