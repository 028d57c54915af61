"""`river-llm cache`: what it lists and what it deletes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import run
from packed_models import PROMPT, save_model
from tiny_gguf import write_tiny_gguf

from river_llm.store import (
    ENVIRONMENT_VARIABLE,
    MANIFEST_NAME,
    STAGING_PREFIX,
    CachedFolder,
    cached_folders,
    folder_for,
)

FIELDS = {"directory", "kind", "source", "form", "river", "bytes"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A place where a model could be, with a name that a terminal could take for a command."""
    directory = tmp_path / ("a [bold]model[/bold] of a long name " + 80 * "x")
    directory.mkdir(parents=True)
    return directory


def _keep(source: Path, form: str, content: bytes = b"content") -> CachedFolder:
    folder = folder_for("packed", "tiny", source, form, str(source))
    assert folder is not None
    folder.keep(len(content), lambda directory: (directory / "weights.bin").write_bytes(content))
    assert folder.is_whole()
    return folder


def _files(directory: Path) -> list[Path]:
    return sorted(directory.rglob("*"))


class TestList:
    def test_has_a_line_for_each_folder(self, source: Path, cache: Path) -> None:
        _keep(source, "packed-16-16", bytes(3 * 2**20))
        _keep(source, "packed-8-8")
        before = _files(cache)
        outcome = run("cache")
        assert outcome.exit_code == 0
        first, second = outcome.stdout.splitlines()
        assert first.split(maxsplit=3) == ["3.0", "MiB", "packed-16-16", str(source)]
        assert second.split(maxsplit=3)[2:] == ["packed-8-8", str(source)]
        assert outcome.stderr == f"2 copies, 3.0 MiB, in {cache}\n"
        assert _files(cache) == before

    def test_tells_the_copies_of_two_rivers_apart(
        self, source: Path, cache: Path, tmp_path: Path
    ) -> None:
        rivers = [tmp_path / "old", tmp_path / "new"]
        for river in rivers:
            river.mkdir()
            folder = folder_for("packed", "tiny", source, "form", {"river": str(river)}, river)
            assert folder is not None
            folder.keep(1, lambda directory: (directory / "weights.bin").write_bytes(b"w"))
        listed = [line.rpartition("  river ")[2] for line in run("cache").stdout.splitlines()]
        assert sorted(listed) == sorted(map(str, rivers))
        found = [folder["river"] for folder in run("cache", "--json").json["folders"]]
        assert found == listed

    def test_in_json_is_all_that_is_printed(self, source: Path, cache: Path) -> None:
        folders = [_keep(source, "packed-16-16"), _keep(source, "packed-8-8", b"more content")]
        outcome = run("cache", "--json")
        assert outcome.stderr == ""
        assert outcome.json["directory"] == str(cache)
        assert all(set(described) == FIELDS for described in outcome.json["folders"])
        for folder, described in zip(folders, outcome.json["folders"], strict=True):
            assert described == {
                "directory": str(folder.directory),
                "kind": "packed",
                "source": str(source),
                "form": folder.form,
                "river": None,
                "bytes": sum(path.stat().st_size for path in folder.directory.iterdir()),
            }

    def test_has_what_the_commands_have_kept(self, tmp_path: Path) -> None:
        model = save_model(tmp_path / "tiny")
        file = write_tiny_gguf(tmp_path / "tiny.gguf")
        assert run("generate", PROMPT, "-m", model, "-n", 2).exit_code == 0
        assert run("generate", PROMPT, "-m", model, "-n", 2, "--lm-head-bits", 8).exit_code == 0
        assert run("generate", PROMPT, "-m", file, "-n", 2, "--group-size", 32).exit_code == 0
        described = [
            (folder["kind"], folder["form"], folder["source"])
            for folder in run("cache", "--json").json["folders"]
        ]
        assert sorted(described) == [
            ("converted", "bfloat16", str(file)),
            ("packed", "packed-16-16-hqq4g32", str(file)),
            ("packed", "packed-16-16-hqq4g64", str(model)),
            ("packed", "packed-16-8-hqq4g64", str(model)),
        ]
        answer = run("generate", PROMPT, "-m", model, "-n", 8, "--json").json
        assert run("cache", "--clear").exit_code == 0
        again = run("generate", PROMPT, "-m", model, "-n", 8, "--json").json
        assert again["tokens"] == answer["tokens"]
        assert len(cached_folders()) == 1

    def test_is_empty_before_anything_is_kept(self, cache: Path) -> None:
        for _ in range(2):
            outcome = run("cache")
            assert (outcome.exit_code, outcome.stdout) == (0, "")
            assert outcome.stderr == f"0 copies, 0 B, in {cache}\n"
            assert run("cache", "--json").json == {"directory": str(cache), "folders": []}
            assert run("cache", "--clear").exit_code == 0
            if not cache.exists():  # it isn't made by looking
                cache.mkdir()
        assert list(cache.iterdir()) == []

    @pytest.mark.parametrize("options", [(), ("--clear",)])
    def test_says_that_the_cache_is_off(
        self, options: tuple[str, ...], source: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _keep(source, "form")
        before = _files(cache)
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
        outcome = run("cache", *options)
        assert (outcome.exit_code, outcome.stdout) == (0, "")
        assert "RIVER_LLM_CACHE is off" in outcome.stderr
        assert run("cache", *options, "--json").json == {"directory": None, "folders": []}
        assert _files(cache) == before

    @pytest.mark.parametrize("options", [(), ("--clear",)])
    def test_is_empty_where_a_file_is_in_its_place(
        self, options: tuple[str, ...], cache: Path
    ) -> None:
        cache.write_text("a file")
        outcome = run("cache", *options)
        assert (outcome.exit_code, outcome.stdout) == (0, "")
        assert outcome.stderr.startswith("0 copies")
        assert cache.read_text() == "a file"

    def test_leaves_out_what_has_no_manifest_of_the_cache(self, source: Path, cache: Path) -> None:
        folder = _keep(source, "form")
        for name, content in {
            "empty": b"",
            "a list": b"[]",
            "a number": b"7",
            "no source": b'{"kind": "packed", "form": "form"}',
            "a source of no path": b'{"kind": "packed", "form": "form", "source": 5}',
            "no text": b"\xff\xfe\x00",
        }.items():
            (cache / name).mkdir()
            (cache / name / MANIFEST_NAME).write_bytes(content)
        (listed,) = run("cache", "--json").json["folders"]
        assert listed["directory"] == str(folder.directory)

    def test_has_the_damaged_ones_too(self, source: Path) -> None:
        folder = _keep(source, "form")
        (folder.directory / "weights.bin").unlink()
        assert not folder.is_whole()
        (listed,) = run("cache", "--json").json["folders"]
        assert listed["directory"] == str(folder.directory)


def _no_weights(folder: CachedFolder) -> None:
    (folder.directory / "weights.bin").unlink()


def _cut_short(folder: CachedFolder) -> None:
    (folder.directory / "weights.bin").write_bytes(b"")


def _half_a_manifest(folder: CachedFolder) -> None:
    path = folder.directory / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:40])


def _an_empty_manifest(folder: CachedFolder) -> None:
    (folder.directory / MANIFEST_NAME).write_bytes(b"")


class TestClear:
    def test_deletes_all_copies_and_says_so(self, source: Path, cache: Path) -> None:
        _keep(source, "packed-16-16", bytes(2**20))
        _keep(source, "packed-8-8")
        listed = run("cache").stdout
        outcome = run("cache", "--clear")
        assert outcome.exit_code == 0
        assert outcome.stdout == listed
        assert outcome.stderr == f"2 copies, 1.0 MiB, deleted from {cache}\n"
        assert list(cache.iterdir()) == []
        assert run("cache", "--clear").stderr == f"0 copies, 0 B, deleted from {cache}\n"

    def test_in_json_has_what_is_gone(self, source: Path, cache: Path) -> None:
        _keep(source, "packed-16-16")
        listed = run("cache", "--json").json
        assert run("cache", "--clear", "--json").json == listed
        assert list(cache.iterdir()) == []
        assert run("cache", "--json").json == {"directory": str(cache), "folders": []}

    @pytest.mark.parametrize(
        "damage", [_no_weights, _cut_short, _half_a_manifest, _an_empty_manifest]
    )
    def test_deletes_damaged_copies_too(
        self, damage: Callable[[CachedFolder], None], source: Path, cache: Path
    ) -> None:
        damage(_keep(source, "form"))
        assert run("cache", "--clear").exit_code == 0
        assert list(cache.iterdir()) == []

    def test_of_one_model_leaves_the_others(self, source: Path, tmp_path: Path) -> None:
        model = save_model(tmp_path / "tiny")
        file = write_tiny_gguf(tmp_path / "tiny.gguf")
        kept = {name: _keep(Path(name), "form") for name in (model, file, source)}
        listed = run("cache", file, "--json").json["folders"]
        assert [folder["source"] for folder in listed] == [str(file)]
        outcome = run("cache", "--clear", file)
        assert outcome.stderr.startswith("1 copies")
        assert [folder.is_whole() for folder in kept.values()] == [True, False, True]
        source.rmdir()  # a model that is gone still has its copy
        assert run("cache", source, "--clear").exit_code == 0
        assert [folder.is_whole() for folder in kept.values()] == [True, False, False]

    def test_of_a_hub_id_has_every_snapshot_and_asks_nobody(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def ask(*args: object, **settings: object) -> None:
            raise AssertionError("the Hub is asked")

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)
        monkeypatch.chdir(tmp_path)
        snapshots = [
            tmp_path / "hub" / repository / "snapshots" / revision
            for repository, revision in (
                ("models--org--name", "old"),
                ("models--org--name", "new"),
                ("models--org--name-2", "new"),
                ("models--other--name", "new"),
                ("models--name", "new"),
            )
        ]
        for snapshot in snapshots:
            snapshot.mkdir(parents=True)
        kept = {snapshot: _keep(snapshot, "form") for snapshot in snapshots}
        snapshots[0].rmdir()  # as where the Hub has a new one
        listed = run("cache", "org/name", "--json").json["folders"]
        assert {folder["source"] for folder in listed} == set(map(str, snapshots[:2]))
        assert run("cache", "org/name", "--clear").stderr.startswith("2 copies")
        assert [kept[place].is_whole() for place in snapshots] == [False, False, True, True, True]
        assert run("cache", "name", "--clear").stderr.startswith("1 copies")
        assert [kept[place].is_whole() for place in snapshots[2:]] == [True, True, False]
        assert run("cache", "org/none").stderr.startswith("0 copies")

    def test_of_a_directory_named_like_a_hub_id_is_of_the_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        places = [save_model(Path("org/name")), tmp_path / "models--org--name" / "snapshot"]
        places[1].mkdir(parents=True)
        kept = [_keep(place, "form") for place in places]
        assert run("cache", "org/name", "--clear").stderr.startswith("1 copies")
        assert [folder.is_whole() for folder in kept] == [False, True]

    def test_deletes_what_is_half_written(self, source: Path, cache: Path) -> None:
        _keep(source, "form")
        for name in ("old", "new"):
            staging = cache / f"{STAGING_PREFIX}{name}"
            staging.mkdir()
            (staging / "weights.bin").write_bytes(b"half")
        assert run("cache", "--clear").exit_code == 0
        assert list(cache.iterdir()) == []

    def test_leaves_foreign_files_and_folders_alone(self, source: Path, cache: Path) -> None:
        _keep(source, "form")
        foreign = {
            "notes.txt": "a file",
            "photos/river.jpg": "a folder of files",
            "photos/2024/deep.jpg": "a folder in it",
            "photos/2024/copy.json": "the manifest's name, but deeper",
            ".hidden/copy.json": "the manifest's name in a hidden folder",
            MANIFEST_NAME: "the manifest's name, but no folder",
            f"{STAGING_PREFIX}.txt": "a file named like a folder that is being written",
        }
        for name, content in foreign.items():
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_text(content)
        (cache / "empty").mkdir()
        assert run("cache", "--clear").exit_code == 0
        kept = {
            path.relative_to(cache).as_posix(): path.read_text()
            for path in cache.rglob("*")
            if path.is_file()
        }
        assert kept == foreign
        assert (cache / "empty").is_dir()

    @pytest.mark.parametrize(
        "content", [json.dumps({"copies": 3, "printer": "hall"}), json.dumps([1, 2])]
    )
    def test_leaves_a_foreign_folder_with_a_file_of_the_manifests_name_alone(
        self, content: str, cache: Path
    ) -> None:
        foreign = cache / "printer"
        foreign.mkdir(parents=True)
        (foreign / MANIFEST_NAME).write_text(content)
        (foreign / "letters.txt").write_text("dear all")
        assert run("cache", "--clear").exit_code == 0
        assert (foreign / "letters.txt").read_text() == "dear all"

    def test_leaves_the_models_alone(self, source: Path, cache: Path) -> None:
        (source / "model.safetensors").write_bytes(b"weights")
        folder = _keep(source, "form")
        (folder.directory / "link").symlink_to(source, target_is_directory=True)
        (cache / "linked").symlink_to(source, target_is_directory=True)
        (source / MANIFEST_NAME).write_bytes((folder.directory / MANIFEST_NAME).read_bytes())
        assert run("cache", "--clear").exit_code == 0
        assert (source / "model.safetensors").read_bytes() == b"weights"
        assert not folder.directory.exists()

    def test_is_for_the_folder_that_is_named(
        self, source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _keep(source, "form")
        before = _files(cache)
        elsewhere = tmp_path / "home" / "river-llm"
        monkeypatch.delenv(ENVIRONMENT_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", os.fspath(elsewhere.parent))
        _keep(source, "form")
        assert [folder.directory.parent for folder in cached_folders()] == [elsewhere]
        assert run("cache", "--clear").exit_code == 0
        assert list(elsewhere.iterdir()) == []
        assert _files(cache) == before


def test_a_model_that_is_none_is_refused(tmp_path: Path) -> None:
    run("cache", tmp_path / "none").check_fails(1, "no file or directory")
