"""The store: whole or not there, never read in place of what its sources say, never needed; and
`river-llm cache`."""

from __future__ import annotations

import errno
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from tiny_gguf import write_tiny_gguf
from transformers import PreTrainedModel

from river_llm import RiverError, store
from river_llm.load.gguf import load_gguf
from river_llm.load.model import load_backbone
from river_llm.store import (
    ENVIRONMENT_VARIABLE,
    MANIFEST_NAME,
    STAGING_PREFIX,
    CachedFolder,
    atomic_write,
    cache_directory,
    cached_folders,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    store._warn.cache_clear()
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A place where a model could be, with a name that a terminal could take for a command."""
    directory = tmp_path / ("a [bold]model[/bold] of a long name " + 80 * "x")
    directory.mkdir(parents=True)
    return directory


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


class TestAtomicWrite:
    @pytest.mark.parametrize("old", [None, "old"])
    @pytest.mark.parametrize("is_folder", [False, True])
    def test_replaces_a_file_or_a_folder_or_leaves_it(
        self, is_folder: bool, old: str | None, tmp_path: Path
    ) -> None:
        path = tmp_path / "new"

        def write(text: str, fails: bool = False) -> None:
            with atomic_write(path) as new:
                if is_folder:
                    (new / "deep").mkdir(parents=True)
                (new / "deep" / "file" if is_folder else new).write_text(text)
                if fails:
                    raise KeyboardInterrupt

        def content() -> str | None:
            file = path / "deep" / "file" if is_folder else path
            return file.read_text() if file.exists() else None

        if old is not None:
            write(old)
        with pytest.raises(KeyboardInterrupt):
            write("half", fails=True)
        assert content() == old
        write("whole")
        assert content() == "whole"
        assert list(tmp_path.iterdir()) == [path]

    def test_lets_those_read_who_could(self, tmp_path: Path) -> None:
        plain, kept = tmp_path / "plain", tmp_path / "kept"
        plain.touch()
        kept.touch()
        kept.chmod(0o640)
        for path in (tmp_path / "new", kept):
            with atomic_write(path) as new:
                new.touch(mode=0o600)
        assert (tmp_path / "new").stat().st_mode == plain.stat().st_mode
        assert kept.stat().st_mode & 0o777 == 0o640


def _of_file(content: bytes) -> Callable[[CachedFolder], object]:
    return lambda folder: (folder.directory / "weights.bin").write_bytes(content)


def _of_manifest(content: bytes) -> Callable[[CachedFolder], object]:
    return lambda folder: (folder.directory / MANIFEST_NAME).write_bytes(content)


DAMAGES: dict[str, Callable[[CachedFolder], object]] = {
    "no file": lambda folder: (folder.directory / "weights.bin").unlink(),
    "cut short": _of_file(b"conten"),
    "changed": _of_file(b"c0ntent"),
    **{
        f"manifest {content!r}": _of_manifest(content)
        for content in (b"", b"[]", b'{"files": 5}', b"\xff\xfe\x00")
    },
}


class TestAFolder:
    def test_is_found_again_with_what_it_is_made_from(self, source: Path, tmp_path: Path) -> None:
        folders = [
            keep(source),
            keep(source, "other"),
            keep(source, river=source),
            keep(tmp_path, origin={"a": [1, None]}),
        ]
        assert all(folder.is_whole() for folder in folders)
        assert sorted(map(str, cached_folders())) == sorted(map(str, folders))

    def test_of_a_source_that_has_changed_is_replaced(self, source: Path) -> None:
        before = keep(source, origin=[1])
        changed = CachedFolder.of("repacked", source, "form", [2])
        assert changed is not None
        assert not changed.is_whole()
        assert changed.read(Path) is None
        after = keep(source, content=b"other", origin=[2])
        assert cached_folders() == [after] == [changed]
        assert not before.is_whole()
        assert (after.directory / "weights.bin").read_bytes() == b"other"

    def test_of_sources_that_are_gone_goes_with_the_next_one(
        self, source: Path, tmp_path: Path
    ) -> None:
        river = tmp_path / "river"
        river.mkdir()
        keep(source)
        keep(tmp_path, river=river)
        source.rmdir()
        river.rmdir()
        left = keep(tmp_path, "other")
        assert cached_folders() == [left]

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_that_is_damaged_is_not_read(self, damage: str, source: Path, cache: Path) -> None:
        folder = keep(source)
        DAMAGES[damage](folder)
        assert not folder.is_whole()
        assert folder.read(lambda _: "read") is None
        assert keep(source).read(lambda _: "read") == "read"
        DAMAGES[damage](folder)
        assert run("cache", "--clear").exit_code == 0
        assert list(cache.iterdir()) == []

    def test_that_cannot_be_read_is_removed_unless_the_reason_lies_elsewhere(
        self, source: Path
    ) -> None:
        def fail(error: BaseException) -> Callable[[Path], None]:
            def read(_: Path) -> None:
                raise error

            return read

        folder = keep(source)
        for error in (RiverError("a setting"), MemoryError(), KeyboardInterrupt()):
            with pytest.raises(type(error)):
                folder.read(fail(error))
            assert folder.is_whole()
        assert folder.read(fail(KeyError("name"))) is None
        assert not folder.directory.exists()

    @pytest.mark.parametrize("reason", ["a file in its place", "space", "rights"])
    def test_where_none_can_be_is_told_once(
        self,
        reason: str,
        source: Path,
        cache: Path,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        content = b"content"
        if reason == "a file in its place":
            cache.write_text("a file")
        elif reason == "space":
            usage = type("Usage", (), {"free": 2 * len(content) - 1})
            monkeypatch.setattr("river_llm.store.shutil.disk_usage", lambda _: usage)
        else:

            def refuse(**_: object) -> None:
                raise PermissionError(errno.EACCES, "no way")

            monkeypatch.setattr("river_llm.store.tempfile.mkdtemp", refuse)
        for _ in range(2):
            assert not keep(source, content=content).is_whole()
        (message,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert message.startswith(f"nothing can be kept in the cache {cache} (")
        assert message.endswith("; set RIVER_LLM_CACHE to a folder that can be written, or to off")
        assert "\n" not in message
        assert cache.is_file() or list(cache.iterdir()) == []

    def test_that_a_killed_process_left_half_written_is_swept_after_a_day(
        self, source: Path, cache: Path
    ) -> None:
        old, new = cache / f"{STAGING_PREFIX}old", cache / f"{STAGING_PREFIX}new"
        for directory in (old, new):
            directory.mkdir(parents=True)
        os.utime(old, (0, 0))
        keep(source)
        assert not old.exists()
        assert new.exists()

    def test_is_where_the_user_says(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
        assert cache_directory() is None
        assert CachedFolder.of("repacked", tmp_path, "form", 0) is None
        assert cached_folders() == []
        monkeypatch.delenv(ENVIRONMENT_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache_directory() == tmp_path / "river-llm"


class TestAConvertedFile:
    @pytest.fixture
    def file(self, tmp_path: Path) -> Path:
        return write_tiny_gguf(tmp_path / "tiny.gguf")

    @pytest.fixture
    def parsed(self, monkeypatch: pytest.MonkeyPatch) -> list[object]:
        """Grows with every load of a GGUF file itself."""
        parsed: list[object] = []

        def counted(*args: Any) -> Any:
            parsed.append(args)
            return load_gguf(*args)

        monkeypatch.setattr("river_llm.load.gguf_copy.load_gguf", counted)
        return parsed

    @staticmethod
    def same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
        weights, others = model.state_dict(), other.state_dict()
        return weights.keys() == others.keys() and all(
            torch.equal(weights[name], others[name]) for name in weights
        )

    def test_is_parsed_once_for_each_dtype_and_change(
        self, file: Path, parsed: list[object]
    ) -> None:
        first, tokenizer = load_backbone(file)
        second, again = load_backbone(file)
        assert len(parsed) == 1
        assert self.same(first, second)
        assert second.dtype == torch.bfloat16
        assert again("ab").input_ids == tokenizer("ab").input_ids
        assert again.chat_template == tokenizer.chat_template
        load_backbone(file, torch.float32)
        assert len(parsed) == 2
        write_tiny_gguf(file, seed=1)
        after, _ = load_backbone(file)
        assert len(parsed) == 3
        assert not self.same(first, after)
        found = sorted((folder.source, folder.form) for folder in cached_folders())
        assert found == [(file, "bfloat16"), (file, "float32")]

    @pytest.mark.parametrize("reason", ["no folder", "unreadable"])
    def test_is_parsed_where_there_is_no_copy(
        self,
        file: Path,
        cache: Path,
        parsed: list[object],
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if reason == "no folder":
            cache.touch()
        first, _ = load_backbone(file)
        if reason == "unreadable":
            monkeypatch.setattr("river_llm.load.gguf_copy._read", lambda _, dtype: {}[dtype])
        second, _ = load_backbone(file)
        assert len(parsed) == 2
        assert self.same(first, second)


class TestCommand:
    def test_lists_and_clears(self, source: Path, cache: Path) -> None:
        keep(source, "16-16", bytes(3 * 2**20))
        keep(source, "8-8", river=source)
        outcome = run("cache")
        first, second = outcome.stdout.splitlines()
        assert first.split(maxsplit=3) == ["3.0", "MiB", "16-16", str(source)]
        assert second.split(maxsplit=3)[2:] == ["8-8", f"{source}  river {source}"]
        assert outcome.stderr == f"2 copies, 3.0 MiB, in {cache}\n"
        listed = run("cache", "--json")
        assert listed.stderr == ""
        for folder, described in zip(cached_folders(), listed.json["folders"], strict=True):
            assert described == {
                "directory": str(folder.directory),
                "kind": "repacked",
                "source": str(source),
                "form": folder.form,
                "river": folder.river and str(folder.river),
                "bytes": folder.num_bytes,
            }
        assert run("cache", "--clear", "--json").json == listed.json
        assert list(cache.iterdir()) == []
        assert run("cache", "--clear").stderr == f"0 copies, 0 B, deleted from {cache}\n"
        cache.rmdir()
        assert run("cache", "--json").json == {"directory": str(cache), "folders": []}
        assert not cache.exists()  # it isn't made by looking

    @pytest.mark.parametrize("options", [(), ("--clear",)])
    def test_says_where_there_is_none(
        self, options: tuple[str, ...], cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        cache.write_text("a file")
        assert run("cache", *options).stderr.startswith("0 copies")
        assert cache.read_text() == "a file"
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
        outcome = run("cache", *options)
        assert (outcome.exit_code, outcome.stdout) == (0, "")
        assert outcome.stderr.startswith("nothing is kept: RIVER_LLM_CACHE is off")

    def test_of_one_model_leaves_the_others(self, source: Path, tmp_path: Path) -> None:
        model, file = tmp_path / "tiny", tmp_path / "tiny.gguf"
        model.mkdir()
        file.touch()
        kept = [keep(place) for place in (model, file, source)]
        for name in (file, "tiny.gguf", "smollm2"):
            listed = run("cache", name, "--json").json["folders"]
            assert [folder["source"] for folder in listed] == [str(file)] * (name != "smollm2")
        for part in ("tiny.g", "a", tmp_path.parent):
            assert run("cache", part, "--clear").stderr.startswith("0 copies")
        assert run("cache", "--clear", file).stderr.startswith("1 copies")
        source.rmdir()  # a model that is gone still has its copy
        assert run("cache", source, "--clear").exit_code == 0
        assert [folder.is_whole() for folder in kept] == [True, False, False]

    def test_of_a_hub_id_has_every_snapshot_and_asks_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
        monkeypatch.chdir(tmp_path)
        snapshots = [
            tmp_path / f"models--{name}" / "snapshots" / revision
            for name, revision in (
                *(("org--name", "old"), ("org--name", "new")),
                *(("org--name-2", "new"), ("name", "new")),
            )
        ]
        for snapshot in snapshots:
            snapshot.mkdir(parents=True)
        kept = [keep(snapshot) for snapshot in snapshots]
        snapshots[0].rmdir()  # as where the Hub has a new one
        assert run("cache", "org/name", "--clear").stderr.startswith("2 copies")
        assert [folder.is_whole() for folder in kept] == [False, False, True, True]
        assert run("cache", "name-2").stderr.startswith("0 copies")
        Path("org/name-2").mkdir(parents=True)  # a directory of that name comes first
        folder = keep(Path("org/name-2"))
        assert run("cache", "org/name-2", "--clear").stderr.startswith("1 copies")
        assert [folder.is_whole(), kept[2].is_whole()] == [False, True]

    def test_leaves_alone_what_is_not_the_stores(self, source: Path, cache: Path) -> None:
        folder = keep(source)
        (cache / f"{STAGING_PREFIX}half").mkdir()
        foreign = {
            f"photos/2024/{MANIFEST_NAME}": "the manifest's name, but deeper",
            f".hidden/{MANIFEST_NAME}": "the manifest's name in a hidden folder",
            f"printer/{MANIFEST_NAME}": json.dumps({"copies": 3, "printer": "hall"}),
            MANIFEST_NAME: "the manifest's name, but no folder",
            f"{STAGING_PREFIX}.txt": "a file named like a folder that is being written",
        }
        for name, content in foreign.items():
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_text(content)
        (source / "model.safetensors").write_bytes(b"weights")
        (folder.directory / "link").symlink_to(source, target_is_directory=True)
        (cache / "linked").symlink_to(source, target_is_directory=True)
        assert run("cache").stderr.startswith("1 copies")
        assert run("cache", "--clear").exit_code == 0
        assert (source / "model.safetensors").read_bytes() == b"weights"
        kept = [path for path in cache.rglob("*") if path.is_file() and not path.is_symlink()]
        left = {path.relative_to(cache).as_posix(): path.read_text() for path in kept}
        left.pop("linked/model.safetensors", None)
        assert left == foreign
        assert {path.name for path in cache.iterdir() if path.is_dir()} == {
            *("photos", ".hidden", "printer", "linked")
        }
