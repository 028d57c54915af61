"""`river-llm cache`: what it lists and what it deletes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command_line import run
from store_folders import keep
from stored_models import PROMPT, save_model
from tiny_gguf import write_tiny_gguf

from river_llm import store
from river_llm.store import (
    ENVIRONMENT_VARIABLE,
    MANIFEST_NAME,
    STAGING_PREFIX,
    cached_folders,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    store._told.clear()
    return directory


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A place where a model could be, with a name that a terminal could take for a command."""
    directory = tmp_path / ("a [bold]model[/bold] of a long name " + 80 * "x")
    directory.mkdir(parents=True)
    return directory


def test_lists_and_clears(source: Path, cache: Path) -> None:
    keep(source, "16-16", bytes(3 * 2**20))
    keep(source, "8-8", river=source)
    outcome = run("cache")
    first, second = outcome.stdout.splitlines()
    assert first.split(maxsplit=3) == ["3.0", "MiB", "16-16", str(source)]
    assert second.split(maxsplit=3)[2:] == ["8-8", f"{source}  river {source}"]
    assert outcome.stderr == f"2 copies, 3.0 MiB, in {cache}\n"
    listed = run("cache", "--json")
    assert listed.stderr == ""
    assert listed.json["directory"] == str(cache)
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


def test_has_what_other_commands_have_kept(tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny")
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    assert run("generate", PROMPT, "-m", model, "-n", 2, "--lm-head-bits", 8).exit_code == 0
    assert run("generate", PROMPT, "-m", file, "-n", 2, "--group-size", 32).exit_code == 0
    folders = run("cache", "--json").json["folders"]
    assert sorted((one["kind"], one["form"], one["source"]) for one in folders) == [
        ("converted", "bfloat16", str(file)),
        ("repacked", "16-16-hqq4g32", str(file)),
        ("repacked", "16-8-hqq4g64", str(model)),
    ]


@pytest.mark.parametrize("options", [(), ("--clear",)])
@pytest.mark.parametrize("place", ["off", "a file"])
def test_says_where_there_is_none(
    options: tuple[str, ...], place: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if place == "off":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
        expected = "nothing is kept: RIVER_LLM_CACHE is off"
    else:
        cache.write_text("a file")
        expected = "0 copies"
    outcome = run("cache", *options)
    assert (outcome.exit_code, outcome.stdout) == (0, "")
    assert outcome.stderr.startswith(expected)
    assert not cache.exists() or cache.read_text() == "a file"


def test_of_one_model_leaves_the_others(source: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "tiny")
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
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
    assert run("cache", tmp_path / "none").stderr.startswith("0 copies")


def test_of_a_hub_id_has_every_snapshot_and_asks_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)
    monkeypatch.chdir(tmp_path)
    snapshots = [
        tmp_path / "hub" / repository / "snapshots" / revision
        for repository, revision in (
            ("models--org--name", "old"),
            ("models--org--name", "new"),
            ("models--org--name-2", "new"),
            ("models--name", "new"),
        )
    ]
    for snapshot in snapshots:
        snapshot.mkdir(parents=True)
    kept = [keep(snapshot) for snapshot in snapshots]
    snapshots[0].rmdir()  # as where the Hub has a new one
    assert run("cache", "org/name", "--clear").stderr.startswith("2 copies")
    assert [folder.is_whole() for folder in kept] == [False, False, True, True]
    assert run("cache", "name-2").stderr.startswith("0 copies")
    assert run("cache", "org/none").stderr.startswith("0 copies")
    folder = keep(save_model(Path("org/name-2")))  # a directory of that name comes first
    assert run("cache", "org/name-2", "--clear").stderr.startswith("1 copies")
    assert not folder.is_whole()
    assert kept[2].is_whole()


def test_leaves_alone_what_is_not_the_stores(source: Path, cache: Path) -> None:
    folder = keep(source)
    (cache / f"{STAGING_PREFIX}half").mkdir()
    foreign = {
        "notes.txt": "a file",
        "photos/2024/deep.jpg": "a folder in a folder",
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
