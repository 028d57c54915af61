"""Damaged repacked weights are noticed and made anew; an error beside them leaves them."""

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
from stored_models import (
    MIXED,
    PROMPT,
    check_same_lm,
    start,
    start_without_cache,
    starts_from_a_copy,
)

from river_llm import ConfigError, ExitPolicy
from river_llm.load import repacked_weights
from river_llm.load.repacked_weights import read_packed
from river_llm.store import (
    MANIFEST_NAME,
    cached_folders,
    file_digest,
)


def _rewrite(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def rewrite(directory: Path) -> None:
        content = (directory / name).read_bytes()
        assert change(content) != content
        (directory / name).write_bytes(change(content))

    return rewrite


def _unlink(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


# What a manifest may not tell: whoever reads sees it.
DAMAGES: dict[str, Callable[[Path], None]] = {
    "weights cut short": _rewrite("weights.bin", lambda content: content[:-1]),
    "weights with more behind": _rewrite("weights.bin", lambda content: content + b"1"),
    "no weights": _unlink("weights.bin"),
    "an embedding cut short": _rewrite("embedding.bin", lambda content: content[:-2]),
    "no embedding": _unlink("embedding.bin"),
    "no description": _unlink("engine.safetensors"),
    "half a description": _rewrite("engine.safetensors", lambda content: content[:200]),
    "another description": _rewrite("engine.safetensors", lambda content: b"[]"),
    "no tokenizer": _unlink("tokenizer.json"),
    "half a tokenizer": _rewrite("tokenizer.json", lambda content: content[:500]),
}


class TestADamagedCopy:
    @pytest.mark.parametrize("damage", DAMAGES)
    @pytest.mark.parametrize("is_told", [True, False])
    def test_is_made_anew(
        self, damage: str, is_told: bool, model: Path, loads: list[object]
    ) -> None:
        start(model)
        (folder,) = cached_folders()
        DAMAGES[damage](folder.directory)
        assert not folder.is_whole()
        if not is_told:
            path = folder.directory / MANIFEST_NAME
            manifest = json.loads(path.read_text())
            files = [file for file in folder.directory.iterdir() if file != path]
            manifest["files"] = {file.name: file_digest(file) for file in files}
            path.write_text(json.dumps(manifest))
            assert folder.is_whole()
        assert not starts_from_a_copy(loads, model)
        assert folder.is_whole()
        assert starts_from_a_copy(loads, model)

    @given(st.data())
    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_is_seen_by_any_bit_of_any_file(self, saved: Path, data: st.DataObject) -> None:
        if not cached_folders():
            start(saved)
        (folder,) = cached_folders()
        files = json.loads((folder.directory / MANIFEST_NAME).read_text())["files"]
        path = folder.directory / data.draw(st.sampled_from(sorted(files)))
        whole = path.read_bytes()
        bit = data.draw(st.integers(0, 8 * len(whole) - 1))
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        assert not folder.is_whole()
        assert read_packed(folder, MIXED) is None
        path.write_bytes(whole)
        assert folder.is_whole()

    @pytest.mark.parametrize("fate", ["removed", "cut short"])
    def test_while_it_is_read_does_no_harm(
        self, model: Path, loads: list[object], fate: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        read_into = repacked_weights._read_into

        def read_after(arrays: Any, path: Path, sizes: Any) -> None:
            shutil.rmtree(path.parent) if fate == "removed" else os.truncate(path, 1000)
            read_into(arrays, path, sizes)

        with monkeypatch.context() as patched:
            patched.setattr(repacked_weights, "_read_into", read_after)
            lm = start(model)
        assert len(loads) == 2
        check_same_lm(lm, start_without_cache(model))
        assert starts_from_a_copy(loads, model)


@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("place", ["CpuEngine.of_packed", "safe_open", "_read_into"])
def test_an_error_of_memory_or_the_user_leaves_the_copy(
    model: Path, error: BaseException, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    start(model)
    (folder,) = cached_folders()
    monkeypatch.setattr(f"river_llm.load.repacked_weights.{place}", fail)
    with pytest.raises(type(error)):
        start(model)
    outcome = run("generate", PROMPT, "-m", model)
    if isinstance(error, MemoryError):
        outcome.check_fails(1, "not enough memory")
    else:
        assert (outcome.exit_code, outcome.stdout) == (130, "")
    assert folder.is_whole()


def test_an_error_of_a_setting_leaves_the_copy(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(model)
    (folder,) = cached_folders()
    policy = {"policy": ExitPolicy.fixed(99)}
    for options in ({"threads": -1}, {"backbone_bits": 7}, {"engine": "gpu"}, policy):
        with pytest.raises(ConfigError):
            start(model, **options)
    monkeypatch.setenv("RIVER_LLM_CPU", "nonsense")
    with pytest.raises(ConfigError, match="nonsense"):
        start(model)
    assert folder.is_whole()
