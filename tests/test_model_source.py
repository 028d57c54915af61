"""Where a model is, by its name: GGUF files in parts or of other kinds, names that can be none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
from byte_models import byte_model, save_gguf

from river_llm import ModelLoadError
from river_llm.load.source import gguf_parts, model_files, resolve

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)


def _write(folder: Path, *names: str) -> list[Path]:
    files = [folder / name for name in names]
    for file in files:
        file.write_bytes(GGUF if file.suffix == ".gguf" else b"{}")
    return files


def _parts(folder: Path, stem: str = "m", count: int = 3) -> list[Path]:
    return _write(folder, *(f"{stem}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)))


def _message(name: str | Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class TestGgufInParts:
    def test_any_part_or_the_folder_names_the_whole(self, tmp_path: Path) -> None:
        parts = _parts(tmp_path)
        for name in (*parts, str(parts[1]), tmp_path):
            assert resolve(name) == (str(tmp_path), parts[0].name)
        assert gguf_parts(parts[2]) == parts

    def test_all_parts_decide_over_what_is_loaded(self, tmp_path: Path) -> None:
        parts = _parts(tmp_path)
        assert model_files(parts[1]) == (parts[0], parts)

    @pytest.mark.parametrize("lost", range(3))
    def test_a_missing_part_is_named(self, tmp_path: Path, lost: int) -> None:
        parts = _parts(tmp_path)
        parts[lost].unlink()
        for name in (tmp_path, *(part for part in parts if part.exists())):
            assert f"{parts[lost].name} is not beside it" in _message(name)

    def test_every_part_is_looked_at(self, tmp_path: Path) -> None:
        parts = _parts(tmp_path)
        parts[2].write_bytes(POINTER)
        assert _message(parts[0]).startswith(f"{parts[2]} is a Git LFS pointer")

    def test_numbers_that_fit_nothing_are_told(self, tmp_path: Path) -> None:
        (file,) = _write(tmp_path, "m-00003-of-00002.gguf")
        assert "m-00001-of-00002.gguf is not beside it" in _message(file)


class TestFolder:
    @pytest.mark.parametrize(
        "others",
        [(), ("config.json",), ("config.json", "pytorch_model.bin"), ("mmproj-model-f16.gguf",)],
    )
    def test_of_one_gguf_file_is_that_file(self, tmp_path: Path, others: tuple[str, ...]) -> None:
        _write(tmp_path, "model.gguf", *others)
        assert resolve(tmp_path) == (str(tmp_path), "model.gguf")

    @pytest.mark.parametrize("name", ["model.GGUF", "m-00001-of-00001.GGUF"])
    def test_of_a_suffix_in_capitals_is_that_file(self, tmp_path: Path, name: str) -> None:
        _write(tmp_path, name)
        (tmp_path / name).write_bytes(GGUF)
        assert resolve(tmp_path) == (str(tmp_path), name)
        assert gguf_parts(tmp_path / name) == [tmp_path / name]

    @pytest.mark.parametrize("weights", ["model.safetensors", "model-00001-of-00002.safetensors"])
    def test_of_safetensors_too_is_what_config_json_speaks_of(
        self, tmp_path: Path, weights: str
    ) -> None:
        _write(tmp_path, "model.gguf", "config.json", weights)
        assert resolve(tmp_path) == (str(tmp_path), None)

    def test_of_two_models_wants_one_of_them(self, tmp_path: Path) -> None:
        _parts(tmp_path)
        _parts(tmp_path, "other", 2)
        assert "holds 2 GGUF files; name one of them" in _message(tmp_path)


class TestGgufOfAnotherKind:
    def test_big_endian_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "model.gguf"
        save_gguf(file, byte_model(num_hidden_layers=1), endianess=gguf.GGUFEndian.BIG)
        for name in (file, tmp_path):
            assert _message(name) == (
                f"{file} is big-endian GGUF; convert it with: gguf-convert-endian {file} little"
            )

    def test_the_first_version_is_too_old(self, tmp_path: Path) -> None:
        (file,) = _write(tmp_path, "model.gguf")
        file.write_bytes(b"GGUF" + (1).to_bytes(4, "little") + bytes(16))
        assert "is GGUF version 1, which is too old" in _message(file)

    def test_a_git_lfs_pointer_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "model.gguf").write_bytes(POINTER)
        for name in (tmp_path, tmp_path / "model.gguf"):
            assert "git lfs pull" in _message(name)

    @pytest.mark.parametrize(
        ("name", "pieces"),
        [
            ("m.gguf.part1of2", "m.gguf.part*"),
            ("m.gguf.part2of12", "$(ls -v m.gguf.part*)"),
            ("m.gguf-split-a", "m.gguf-split*"),
            ("m.gguf.part-aa", "m.gguf.part*"),
        ],
    )
    def test_a_piece_of_a_file_says_how_to_make_it_whole(
        self, tmp_path: Path, name: str, pieces: str
    ) -> None:
        (tmp_path / name).write_bytes(GGUF)
        for given in (tmp_path, tmp_path / name):
            assert f"(cat {pieces} > m.gguf)" in _message(given)


class TestName:
    @pytest.fixture(autouse=True)
    def _nobody_is_asked(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def ask(*args: object, **settings: object) -> None:
            raise AssertionError("the Hub is asked")

        monkeypatch.setattr("huggingface_hub.HfApi.model_info", ask)

    @pytest.mark.parametrize(
        "name",
        [
            "my model",
            "model:latest",
            "gpt2@main",
            "modèle",
            "C:\\models\\x",
            "a" * 97,
            "-x",
            "x..y",
            "a\0b",
            "org/na\nme",
            "",
            "  ",
        ],
    )
    def test_that_can_be_none_is_told_so(self, name: str) -> None:
        message = _message(name)
        assert "no such file or directory, and that can be no Hub name; " in message
        shown = name if name.strip() and name.isprintable() else repr(name)
        assert message.startswith(f"there is no model {shown}: ")

    @pytest.mark.parametrize("before", ["", "hf.co/", "https://huggingface.co/", "ollama://hf.co/"])
    def test_with_a_quantisation_says_how_to_get_the_file(self, before: str) -> None:
        assert _message(f"{before}org/name-GGUF:Q4_K_M") == (
            f"there is no model {before}org/name-GGUF:Q4_K_M: no such file or directory, and that "
            "can be no Hub name; download the GGUF file (hf download org/name-GGUF --include "
            "'*Q4_K_M*.gguf') and give its path"
        )

    @pytest.mark.parametrize(
        "name", ["x" * 5000, "~nobody-of-that-name/model", "https://huggingface.co/org/name"]
    )
    def test_of_no_path_is_told_so(self, name: str) -> None:
        assert len(_message(name)) < 400

    @pytest.mark.parametrize(
        ("name", "hub_id"),
        [
            ("https://huggingface.co/org/model", "org/model"),
            ("https://huggingface.co/org/model/tree/main?x=1", "org/model"),
            ("hf.co/org/model", "org/model"),
            ("hf://org/model", "org/model"),
            ("ollama://model", "org/name"),
        ],
    )
    def test_that_is_an_address_says_which_id_to_give(self, name: str, hub_id: str) -> None:
        assert _message(name).endswith(f"; give the model's id in the Hub ({hub_id}), or a path")

    def test_of_gguf_files_in_the_hub_says_how_to_get_one(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        files = [SimpleNamespace(rfilename=name) for name in ("config.json", "m.Q4_K_M.gguf")]
        monkeypatch.setattr(
            "huggingface_hub.HfApi.model_info",
            lambda *_, **settings: SimpleNamespace(siblings=files),
        )
        assert "hf download org/name-GGUF FILE.gguf" in _message("org/name-GGUF")
