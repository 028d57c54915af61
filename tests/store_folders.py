"""Folders of the store, for the tests of it and of its command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from river_llm.store import (
    CachedFolder,
)


def keep(
    source: Path,
    form: str = "form",
    content: bytes = b"content",
    origin: Any = 0,
    river: Path | None = None,
) -> CachedFolder:
    folder = CachedFolder.of("repacked", source, form, origin, river)
    assert folder is not None
    folder.keep(len(content), lambda directory: (directory / "weights.bin").write_bytes(content))
    return folder
