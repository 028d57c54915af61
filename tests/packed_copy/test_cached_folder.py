"""Folders of the cache: whole or not there, and named by what they are made from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from river_llm.store import CachedFolder, folder_for


class TestCachedFolder:
    def test_that_another_process_has_written_meanwhile_stays(
        self, cache: Path, tmp_path: Path
    ) -> None:
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None

        def write(text: str) -> Callable[[Path], object]:
            return lambda directory: (directory / "text").write_text(text)

        def write_late(directory: Path) -> None:
            folder.keep(10, write("first"))
            write("second")(directory)

        folder.keep(10, write_late)
        assert folder.is_whole()
        assert (folder.directory / "text").read_text() == "first"
        assert list(cache.iterdir()) == [folder.directory]

    def test_is_another_for_whatever_it_is_made_from(self, tmp_path: Path) -> None:
        made = [
            folder_for(*arguments)
            for arguments in (
                ("packed", "tiny", tmp_path, "form", {"a": 1}),
                ("packed", "tiny", tmp_path, "form", {"a": 2}),
                ("packed", "tiny", tmp_path, "form", {"b": 1}),
                ("packed", "tiny", tmp_path, "other", {"a": 1}),
                ("packed", "large", tmp_path, "form", {"a": 1}),
            )
        ]
        assert len({folder.directory for folder in made if folder is not None}) == 5
        same = folder_for("packed", "tiny", tmp_path, "form", {"a": 1})
        assert same == made[0]

    def test_is_found_again_by_its_manifest(self, tmp_path: Path) -> None:
        folder = folder_for("packed", "tiny", tmp_path, "form", {})
        assert folder is not None
        folder.keep(10, lambda directory: np.arange(4).tofile(directory / "numbers"))
        assert CachedFolder.at(folder.directory) == folder
        assert folder.num_bytes == sum(path.stat().st_size for path in folder.directory.iterdir())
