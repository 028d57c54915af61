"""The converted copies of GGUF files, so that each is parsed once and not at every load.

transformers takes ten seconds to parse and dequantise a GGUF file of 135M parameters, and a
fraction of one to read its copy (`converted_copy`). The cache only ever saves time: where a copy
can't be written, read or trusted, the GGUF file is parsed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING

from river_llm.converted_copy import MANIFEST_NAME, STAGING_PREFIX, ConvertedCopy, file_digest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ENVIRONMENT_VARIABLE = "RIVER_LLM_CACHE"
FORMAT_VERSION = 1
_STAGING_LIFETIME = 24 * 60 * 60  # seconds; what is older was left by a process that was killed
# What transformers reads beside a GGUF file, where it is there.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)

_log = logging.getLogger(__name__)


def cache_directory() -> Path | None:
    """Where the copies are: `$RIVER_LLM_CACHE`, or `river-llm` in `$XDG_CACHE_HOME` or `~/.cache`.

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


def copy_of(file: Path, dtype: torch.dtype) -> ConvertedCopy | None:
    """The copy that belongs to a GGUF file as it is now, whether it is there or not.

    None where the cache is off. Its folder is named after the file and a digest of what decides
    over the copy: the file, what lies beside it, the dtype, the version of transformers.

    Raises:
        OSError: the file can't be read.
    """
    import transformers

    parent = cache_directory()
    if parent is None:
        return None
    name = str(dtype).removeprefix("torch.")
    companions = [path for path in map(file.with_name, _COMPANIONS) if path.is_file()]
    origin = {
        "format_version": FORMAT_VERSION,
        "transformers": transformers.__version__,
        "dtype": name,
        "modified": file.stat().st_mtime_ns,
        "digests": {path.name: file_digest(path) for path in [file, *companions]},
    }
    key = hashlib.sha256(json.dumps(origin).encode()).hexdigest()[:16]
    return ConvertedCopy(parent / f"{file.stem[:100]}-{name}-{key}", file.resolve(), name)


def read_copy(copy: ConvertedCopy) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Model and tokeniser; None where there is no copy, or a damaged one, which is removed."""
    if not copy.is_whole():
        return None
    try:
        return copy.read()
    except Exception as error:  # whatever is wrong with it, the source is still there
        _log.info("removing the copy %s, which can't be read: %s", copy.directory, error)
        copy.remove()
        return None


def keep_copy(
    copy: ConvertedCopy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the copy, and remove those of the file's earlier states.

    Never fails: without a copy the next load takes longer, and that is all.
    """
    parent = copy.directory.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        for path in parent.glob(f"{STAGING_PREFIX}*"):
            if time.time() - path.stat().st_mtime > _STAGING_LIFETIME:
                shutil.rmtree(path, ignore_errors=True)
        weight_bytes = sum(weight.nbytes for weight in model.parameters())
        if shutil.disk_usage(parent).free < 2 * weight_bytes:
            raise OSError("it would take more than half of the space that is left")
        copy.write(model, tokenizer)
        for other in cached_copies():
            if (other.source, other.dtype) == (copy.source, copy.dtype) and other != copy:
                other.remove()
    except Exception as error:
        _log.info("no copy of %s is kept in %s: %s", copy.source, parent, error)


def cached_copies() -> list[ConvertedCopy]:
    """All copies in the cache by name, the damaged ones that still have a manifest too."""
    parent = cache_directory()
    paths = sorted(parent.glob(f"[!.]*/{MANIFEST_NAME}")) if parent is not None else ()
    copies = (_copy_at(path.parent) for path in paths)
    return [copy for copy in copies if copy is not None]


def _copy_at(directory: Path) -> ConvertedCopy | None:
    try:
        return ConvertedCopy.at(directory)
    except (OSError, ValueError):
        return None
