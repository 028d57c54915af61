"""The copies of GGUF files: read in place of the file, never instead of what the file says."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_gguf import write_tiny_gguf
from transformers import PreTrainedModel

from river_llm.load import gguf_copy
from river_llm.load.gguf import load_gguf
from river_llm.load.model import load_backbone
from river_llm.store import (
    ENVIRONMENT_VARIABLE,
    MANIFEST_NAME,
    CachedFolder,
    cache_directory,
    cached_folders,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    return directory


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_tiny_gguf(tmp_path / "tiny.gguf")


def _same(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    weights, others = model.state_dict(), other.state_dict()
    return weights.keys() == others.keys() and all(
        torch.equal(weights[name], others[name]) for name in weights
    )


def _count_parses(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A list that grows with every load of a GGUF file itself."""
    parsed: list[object] = []

    def counted(*args: Any) -> Any:
        parsed.append(args)
        return load_gguf(*args)

    monkeypatch.setattr("river_llm.load.model.load_gguf", counted)
    return parsed


def test_the_second_load_reads_the_copy(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = _count_parses(monkeypatch)
    first, tokenizer = load_backbone(file)
    second, again = load_backbone(file)
    assert len(parsed) == 1
    assert _same(first, second)
    assert second.dtype == torch.bfloat16
    assert again("ab").input_ids == tokenizer("ab").input_ids
    assert again.chat_template == tokenizer.chat_template
    assert [copy.source for copy in cached_folders()] == [file]


def test_another_file_or_dtype_is_parsed(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = _count_parses(monkeypatch)
    before, _ = load_backbone(file)
    load_backbone(file, torch.float32)
    assert len(parsed) == 2
    write_tiny_gguf(file, seed=1)
    after, _ = load_backbone(file)
    assert len(parsed) == 3
    assert not _same(before, after)
    # the copy of the file as it was is gone, that in float32 stays
    assert sorted(copy.form for copy in cached_folders()) == ["bfloat16", "float32"]


@pytest.mark.parametrize("damage", ["cut short", "changed", "no manifest", "a bad manifest"])
def test_a_damaged_copy_is_made_anew(
    cache: Path, file: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    parsed = _count_parses(monkeypatch)
    whole, _ = load_backbone(file)
    (copy,) = cached_folders()
    weights, manifest = copy.directory / "model.safetensors", copy.directory / MANIFEST_NAME
    content = weights.read_bytes()
    if damage == "cut short":
        weights.write_bytes(content[:-100])
    elif damage == "changed":
        weights.write_bytes(content[:-10] + bytes(10))
    elif damage == "no manifest":
        manifest.unlink()
    else:
        manifest.write_text("[]")
    again, _ = load_backbone(file)
    assert len(parsed) == 2
    assert _same(whole, again)
    assert CachedFolder.at(copy.directory).is_whole()


def test_a_copy_that_cannot_be_read_is_removed(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_backbone(file)

    def fail(directory: Path, dtype: str) -> None:
        raise ValueError("unreadable")

    parsed = _count_parses(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(gguf_copy, "_read", fail)
        load_backbone(file)
    assert len(parsed) == 1


@pytest.mark.parametrize("reason", ["off", "no space", "no permission"])
def test_without_a_copy_the_file_is_parsed(
    cache: Path, file: Path, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "off":
        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    elif reason == "no space":
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr("river_llm.store.shutil.disk_usage", lambda _: usage)
    else:
        cache.write_text("a file where the folder should be")
    parsed = _count_parses(monkeypatch)
    first, _ = load_backbone(file)
    second, _ = load_backbone(file)
    assert len(parsed) == 2
    assert _same(first, second)


def test_what_a_killed_process_left_is_swept_after_a_day(cache: Path, file: Path) -> None:
    old, new = cache / ".writing-old", cache / ".writing-new"
    for directory in (old, new):
        directory.mkdir(parents=True)
    os.utime(old, (0, 0))
    load_backbone(file)
    assert not old.exists()
    assert new.exists()


def test_the_folder_is_the_users_unless_said_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "river-llm"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
    assert cache_directory() is None
    assert cached_folders() == []
