"""Where a model is, by its name: GGUF files in parts or of other kinds, names that can be none."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from folder_changes import POINTER

from river_llm import ModelLoadError
from river_llm.load.source import gguf_parts, model_files, resolve

GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)


def _write(folder: Path, *names: str) -> list[Path]:
    files = [folder / name for name in names]
    for file in files:
        file.write_bytes(GGUF if file.suffix.lower() == ".gguf" else b"{}")
    return files


def _message(source: str | Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        resolve(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", None)


def test_any_part_of_a_gguf_file_or_its_folder_names_the_whole(tmp_path: Path) -> None:
    parts = _write(tmp_path, *(f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)))
    for name in (*parts, str(parts[1]), tmp_path):
        assert resolve(name) == (str(tmp_path), parts[0].name)
        assert model_files(name) == (parts[0], parts)
    assert gguf_parts(parts[2]) == parts


@pytest.mark.parametrize(
    ("files", "file"),
    [
        (["model.gguf"], "model.gguf"),
        (["model.gguf", "config.json"], "model.gguf"),
        (["model.gguf", "config.json", "pytorch_model.bin"], "model.gguf"),
        (["model.gguf", "mmproj-model-f16.gguf"], "model.gguf"),
        (["model.GGUF"], "model.GGUF"),
        (["m-00001-of-00001.GGUF"], "m-00001-of-00001.GGUF"),
        (["model.gguf", "config.json", "model.safetensors"], None),
        (["model.gguf", "config.json", "model-00001-of-00002.safetensors"], None),
    ],
)
def test_a_folder_is_its_gguf_file_unless_it_holds_a_checkpoint(
    files: list[str], file: str | None, tmp_path: Path
) -> None:
    _write(tmp_path, *files)
    assert resolve(tmp_path) == (str(tmp_path), file)


@pytest.mark.parametrize(
    ("files", "cause"),
    [
        ({"m-00001-of-00002.gguf": GGUF}, "m-00002-of-00002.gguf is not beside it"),
        ({"m-00002-of-00002.gguf": GGUF}, "m-00001-of-00002.gguf is not beside it"),
        ({"m-00003-of-00002.gguf": GGUF}, "m-00001-of-00002.gguf is not beside it"),
        ({"m-00001-of-00002.gguf": GGUF, "m-00002-of-00002.gguf": POINTER}, "is a Git LFS"),
        ({"m.gguf": POINTER}, "git lfs pull"),
        ({"m.gguf.part2of12": GGUF}, r"piece of a GGUF file; join all pieces"),
        ({"m.gguf-split-a": GGUF}, r"piece of a GGUF file; join all pieces"),
    ],
)
def test_a_gguf_file_that_is_not_whole_says_so(
    files: dict[str, bytes], cause: str, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    for source in (tmp_path, tmp_path / next(iter(files))):
        assert re.search(cause, _message(source))


def test_a_folder_of_two_gguf_files_wants_one_of_them(tmp_path: Path) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(GGUF)
    assert "holds 2 GGUF files; name one of them" in _message(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("my model", "model:latest", "gpt2@main", "modèle", "C:\\models\\x", "a" * 97, "-x"),
        *("x..y", "a\0b", "org/na\nme", "", "  "),
    ],
)
def test_what_can_be_no_name_is_told_so(name: str) -> None:
    shown = name if name.strip() and name.isprintable() else repr(name)
    expected = f"there is no model {shown}: no such file or directory, and that can be no Hub "
    assert _message(name).startswith(expected)


@pytest.mark.parametrize("name", ["x" * 5000, "~nobody-of-that-name/model"])
def test_what_can_be_no_path_is_told_so(name: str) -> None:
    assert len(_message(name)) < 400


@pytest.mark.parametrize("before", ["", "hf.co/", "https://huggingface.co/", "ollama://hf.co/"])
@pytest.mark.parametrize("name", ["org/name-GGUF:Q4_K_M", "model:latest"])
def test_an_address_says_what_to_give(before: str, name: str) -> None:
    assert re.search(r"\(org/name\) or a path, .* \(hf download .*", _message(before + name))


def test_a_name_of_gguf_files_in_the_hub_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    files = [SimpleNamespace(rfilename=name) for name in ("config.json", "m.Q4_K_M.gguf")]
    found = SimpleNamespace(siblings=files)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **settings: found)
    assert "hf download org/name-GGUF FILE.gguf" in _message("org/name-GGUF")
