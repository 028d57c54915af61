"""Prompt caches: the keys and values of a prompt's beginning in a file, so that it is read once.

A safetensors file of:

    tokens       int64 [T]
    thresholds   float64 [L], by which each of them left the backbone
    cache.*      keys and values, in a form of the engine's own (`CacheAccess.read_cache`)

Its metadata says what it belongs to (`CacheAccess.cache_identity`), of how many positions the text
was whose rotary angles the keys have, and the digest of all of it. It is written aside and renamed,
and checked as a whole before any of it is used.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import river_llm
from river_llm.engines.step import CacheAccess, Engine
from river_llm.errors import PromptCacheError
from river_llm.generate.cached_text import CachedText, Thresholds
from river_llm.store import atomic_write

# Goes up with every change of the file, and of the numbers that engines compute.
FORMAT_VERSION = 4
_FORMAT = "river-llm prompt cache"
_PART = "cache."
_OTHER_FILE = "give another file"


def write_prompt_cache(path: Path, engine: Engine, text: CachedText) -> None:
    """Write a text of the engine's cache, whole or not at all.

    Raises:
        PromptCacheError: something else is in that place, or it can't be written.
    """
    target = check_writable(path)
    tokens = text.tokens
    parts = _access(engine).read_cache(text.sequence, len(tokens))
    tensors = {f"{_PART}{name}": part for name, part in parts.items()}
    tensors["tokens"] = torch.tensor(tokens)
    tensors["thresholds"] = torch.tensor(text.thresholds, dtype=torch.float64)
    metadata = {
        "format": _FORMAT,
        "identity": json.dumps(_identity(engine, tokens)),
        "positions": str(text.positions),
    }
    metadata["digest"] = _digest(tensors, metadata)
    try:
        with atomic_write(target) as new:
            save_file(tensors, new, metadata)
    except (OSError, SafetensorError) as error:
        raise PromptCacheError(f"can't write the prompt cache {path} ({_brief(error)})") from error


def read_prompt_cache(path: Path, engine: Engine, thresholds: Thresholds | None) -> CachedText:
    """A new sequence of the engine with the text in a file.

    Args:
        thresholds: by which the tokens of prompts leave; None: not each on its own.

    Raises:
        PromptCacheError: there is none, it is damaged, or it belongs to another model, river,
            setting of the engine, or thresholds.
        ContextFullError: it doesn't fit the model's context.
    """
    tensors, metadata = _open(path)
    try:
        if metadata.pop("digest") != _digest(tensors, metadata):
            raise _damaged(path, "its bytes are not those that were written")
        tokens = tensors.pop("tokens").tolist()
        theirs = tuple(tensors.pop("thresholds").tolist())
        identity = json.loads(metadata["identity"])
        positions = int(metadata["positions"])
    except (KeyError, ValueError) as error:
        raise _damaged(path, _brief(error)) from error
    never_left = all(threshold == math.inf for threshold in theirs)
    for name, ours in _identity(engine, tokens).items():
        if identity.get(name) != ours and not (name == "river" and never_left):
            raise PromptCacheError(
                f"{path} was written with another {name} ({str(identity.get(name))[:24]}, this run "
                f"has {ours[:24]}); take the same, or {_OTHER_FILE}"
            )
    if theirs != thresholds:
        raise PromptCacheError(
            f"the tokens in {path} left the backbone otherwise than prompts of this run do; take "
            f"the prefill rule with which it was written, or {_OTHER_FILE}"
        )
    parts = {name.removeprefix(_PART): part for name, part in tensors.items()}
    sequence = engine.add_sequence(positions)
    try:
        _access(engine).write_cache(sequence, parts, len(tokens))
    except BaseException:
        engine.drop_sequence(sequence)
        raise
    return CachedText(sequence, tokens, theirs, positions)


def check_writable(path: Path) -> Path:
    """Where a prompt cache is written: `path`, or what it links to.

    Raises:
        PromptCacheError: something else is there, or nothing can be written there.
    """
    target = Path(os.path.realpath(path))
    if target.exists():
        _open(path)
    places = [target.parent, target] if target.exists() else [target.parent]
    if not all(os.access(place, os.W_OK) for place in places):
        raise PromptCacheError(
            f"{path} can't be written: it or its folder is read-only, or there is no folder "
            f"{target.parent}; {_OTHER_FILE}"
        )
    return target


def _open(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors, mapped from it, and its metadata.

    Raises:
        PromptCacheError: it is no prompt cache, or damaged.
    """
    if not path.exists():
        raise PromptCacheError(f"there is no prompt cache {path}")
    if not path.is_file():
        raise _damaged(path, "it is no file")
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise _damaged(path, "it is another file")
            return {name: opened.get_tensor(name) for name in opened.keys()}, metadata  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise _damaged(path, _brief(error)) from error


def _access(engine: Engine) -> CacheAccess:
    if not isinstance(engine, CacheAccess):
        raise PromptCacheError(f"the {engine.name} engine has no prompt caches; take another")
    return engine


def _identity(engine: Engine, tokens: Sequence[int]) -> dict[str, str]:
    version = f"{river_llm.__version__}, format {FORMAT_VERSION}"
    return {"version": version, **_access(engine).cache_identity(tokens)}


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        content: Any = values.contiguous().view(torch.uint8).numpy()
        digest.update(content)
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> PromptCacheError:
    return PromptCacheError(
        f"{path} is no prompt cache, or one that is damaged ({why}); {_OTHER_FILE}"
    )


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
