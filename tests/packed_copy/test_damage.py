"""A damaged packed copy is noticed and made anew; an error beside it leaves it."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_models import (
    MIXED,
    PROMPT,
    check_same_lm,
    start,
    start_without_cache,
    starts_from_a_copy,
)

from river_llm import ConfigError, ExitPolicy
from river_llm.load import repacked_weights as packed_copy_module
from river_llm.load.repacked_weights import read_packed
from river_llm.river import LEARNT_NAME
from river_llm.store import MANIFEST_NAME, cached_folders, file_digest


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes() for path in directory.iterdir() if path.name != LEARNT_NAME
    }


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        path = directory / name
        content = path.read_bytes()
        assert change(content) != content
        path.write_bytes(change(content))

    return rewrite


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def _flip(place: float) -> Callable[[bytes], bytes]:
    def flip(content: bytes) -> bytes:
        index = int(place * (len(content) - 1))
        return content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :]

    return flip


DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": _rewrite("weights.bin", lambda content: content[:-1]),
    "weights with more behind": _rewrite("weights.bin", lambda content: content + b"1"),
    "no bytes of weights": _rewrite("weights.bin", lambda content: b""),
    "weights of zeros": _rewrite("weights.bin", lambda content: bytes(len(content))),
    "the first bit of weights": _rewrite("weights.bin", _flip(0)),
    "a bit of weights": _rewrite("weights.bin", _flip(0.6)),
    "the last bit of weights": _rewrite("weights.bin", _flip(1)),
    "no weights": _unlink("weights.bin"),
    "an embedding cut short": _rewrite("embedding.bin", lambda content: content[:-2]),
    "no embedding": _unlink("embedding.bin"),
    "no description": _unlink("packed.json"),
    "half a description": _rewrite("packed.json", lambda content: content[:200]),
    "another description": _rewrite("packed.json", lambda content: b"[]"),
    "a description of other numbers": _rewrite(
        "packed.json", lambda content: content.replace(b'"window": 0', b'"window": 4')
    ),
    "no parts": _unlink("parts.safetensors"),
    "parts cut short": _rewrite("parts.safetensors", lambda content: content[:-4]),
    "a bit of parts": _rewrite("parts.safetensors", _flip(0.9)),
    "no tokeniser": _unlink("tokenizer.json"),
    "half a tokeniser": _rewrite("tokenizer.json", lambda content: content[:500]),
    "no settings of the tokeniser": _unlink("tokenizer_config.json"),
    "no chat template": _unlink("chat_template.jinja"),
    "no manifest": _unlink(MANIFEST_NAME),
    "an empty manifest": _rewrite(MANIFEST_NAME, lambda content: b""),
    "half a manifest": _rewrite(MANIFEST_NAME, lambda content: content[:100]),
    "another manifest": _rewrite(MANIFEST_NAME, lambda content: b"[]"),
    "a manifest of no object": _rewrite(MANIFEST_NAME, lambda content: b'{"files": 5}'),
    "a manifest in no encoding": _rewrite(MANIFEST_NAME, lambda content: b"\xff\xfe\x00"),
    "no files at all": lambda directory: [path.unlink() for path in directory.iterdir()] and None,
}

# What is_whole can't see once the manifest says so: whoever reads sees it.
UNSEEN = [
    "weights cut short",
    "weights with more behind",
    "no bytes of weights",
    "no weights",
    "an embedding cut short",
    "no embedding",
    "no description",
    "half a description",
    "another description",
    "no parts",
    "parts cut short",
    "no tokeniser",
    "half a tokeniser",
]


class TestADamagedCopy:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_made_anew(self, damage: str, model: Path, loads: list[object]) -> None:
        start(model)
        (folder,) = cached_folders()
        whole = files_of(folder.directory)
        DAMAGES[damage](folder.directory)
        assert not folder.is_whole()
        assert not starts_from_a_copy(loads, model)
        assert files_of(folder.directory) == whole
        assert starts_from_a_copy(loads, model)

    @pytest.mark.parametrize("damage", UNSEEN)
    def test_is_made_anew_where_its_manifest_says_that_it_is_whole(
        self, damage: str, model: Path, loads: list[object]
    ) -> None:
        start(model)
        (folder,) = cached_folders()
        whole = files_of(folder.directory)
        DAMAGES[damage](folder.directory)
        manifest = json.loads((folder.directory / MANIFEST_NAME).read_text())
        manifest["files"] = {
            path.name: file_digest(path)
            for path in folder.directory.iterdir()
            if path.name != MANIFEST_NAME
        }
        (folder.directory / MANIFEST_NAME).write_text(json.dumps(manifest))
        assert folder.is_whole()
        assert not starts_from_a_copy(loads, model)
        assert files_of(folder.directory) == whole

    @given(st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_is_seen_by_any_bit_of_any_file(self, saved: Path, data: st.DataObject) -> None:
        if not cached_folders():
            start(saved)
        (folder,) = cached_folders()
        whole = files_of(folder.directory)
        name = data.draw(st.sampled_from(sorted(set(whole) - {MANIFEST_NAME})))
        bit = data.draw(st.integers(0, 8 * len(whole[name]) - 1))
        changed = bytearray(whole[name])
        changed[bit // 8] ^= 1 << bit % 8
        (folder.directory / name).write_bytes(changed)
        assert not folder.is_whole()
        assert read_packed(folder, MIXED) is None
        (folder.directory / name).write_bytes(whole[name])
        assert folder.is_whole()

    def test_of_another_model_under_its_name_is_not_read(
        self, model: Path, other: Path, loads: list[object]
    ) -> None:
        start(model)
        start(other)
        ours, theirs = sorted(cached_folders(), key=lambda folder: folder.source != model)
        for name in ("weights.bin", "embedding.bin"):
            shutil.copy(theirs.directory / name, ours.directory / name)
        assert not starts_from_a_copy(loads, model)

    @pytest.mark.parametrize("fate", ["removed", "cut short"])
    def test_while_it_is_read_does_no_harm(
        self, model: Path, loads: list[object], fate: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        read_into = packed_copy_module._read_into

        def read_after(array: Any, path: Path) -> None:
            if fate == "removed":
                shutil.rmtree(path.parent)
            else:
                os.truncate(path, 1000)
            read_into(array, path)

        with monkeypatch.context() as patched:
            patched.setattr(packed_copy_module, "_read_into", read_after)
            lm = start(model)
        assert len(loads) == 2
        check_same_lm(lm, start_without_cache(model))
        assert starts_from_a_copy(loads, model)


class TestAnErrorBesideTheCopy:
    def test_of_the_processor_leaves_it(
        self, model: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        (folder,) = cached_folders()
        with monkeypatch.context() as patched:
            patched.setenv("RIVER_LLM_CPU", "nonsense")
            with pytest.raises(ConfigError, match="nonsense") as raised:
                start(model)
            assert "\n" not in str(raised.value)
            run("generate", PROMPT, "-m", model).check_fails(1, "nonsense")
        assert folder.is_whole()
        assert starts_from_a_copy(loads, model)

    @pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
    @pytest.mark.parametrize("place", ["CpuEngine.of_packed", "load_file", "_read_into"])
    def test_of_memory_or_the_user_leaves_it(
        self,
        model: Path,
        loads: list[object],
        error: BaseException,
        place: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*_: object, **__: object) -> None:
            raise error

        start(model)
        (folder,) = cached_folders()
        with monkeypatch.context() as patched:
            patched.setattr(f"river_llm.load.repacked_weights.{place}", fail)
            with pytest.raises(type(error)):
                start(model)
            outcome = run("generate", PROMPT, "-m", model)
            if isinstance(error, MemoryError):
                outcome.check_fails(1, "not enough memory")
            else:
                assert (outcome.exit_code, outcome.stdout) == (130, "")
        assert folder.is_whole()
        assert starts_from_a_copy(loads, model)

    def test_of_a_setting_leaves_it(self, model: Path, loads: list[object]) -> None:
        start(model)
        for options in ({"threads": -1}, {"backbone_bits": 7}, {"engine": "gpu"}):
            with pytest.raises(ConfigError):
                start(model, **options)
        with pytest.raises(ConfigError):
            start(model, policy=ExitPolicy.fixed(99))
        assert starts_from_a_copy(loads, model)
