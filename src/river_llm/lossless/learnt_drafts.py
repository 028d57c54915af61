"""What was learnt about drafts, kept beside the river in `drafts.json` for the next run.

It holds counts and times, decides over speed alone, and may be deleted at any time.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from river_llm.river import LEARNT_NAME
from river_llm.store import atomic_write

FORMAT_VERSION = 1

_log = logging.getLogger(__name__)


def read_learnt(directory: Path, key: str) -> dict[str, Any] | None:
    """What was learnt under a key, which names engine and setting; None where nothing is to be
    had."""
    entry = _entries(directory).get(key)
    return entry if isinstance(entry, dict) else None


def write_learnt(directory: Path, key: str, learnt: dict[str, Any]) -> None:
    """Keep it, beside what there is under other keys; a folder that can't be written to stays as it
    is."""
    entries = _entries(directory)
    entries[key] = learnt
    text = json.dumps({"format_version": FORMAT_VERSION, "entries": entries}, indent=1) + "\n"
    try:
        with atomic_write(directory / LEARNT_NAME) as new:
            new.write_text(text, encoding="utf-8")
    except OSError as error:
        _log.info("what was learnt about drafts can't be kept in %s: %s", directory, error)


def _entries(directory: Path) -> dict[str, Any]:
    try:
        content = json.loads((directory / LEARNT_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    is_known = isinstance(content, dict) and content.get("format_version") == FORMAT_VERSION
    entries = content.get("entries") if is_known else None
    return entries if isinstance(entries, dict) else {}
