"""Where no packed copy can be written, or several processes write one at once."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from packed_models import PROMPT, ROUNDED, start, start_without_cache, starts_from_a_copy

from river_llm.load import repacked_weights as packed_copy_module
from river_llm.store import ENVIRONMENT_VARIABLE, MANIFEST_NAME, STAGING_PREFIX, cached_folders


class TestWithoutACache:
    @pytest.mark.parametrize(
        "reason", ["off", "no space", "no folder", "no permission", "full at last", "no core"]
    )
    def test_a_start_loads_the_model(
        self,
        model: Path,
        cache: Path,
        loads: list[object],
        reason: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if reason == "off":
            monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")
        elif reason == "no space":
            usage = type("Usage", (), {"free": 1000})
            monkeypatch.setattr("river_llm.store.shutil.disk_usage", lambda _: usage)
        elif reason == "no folder":
            cache.write_text("a file where the folder should be")
        elif reason == "no permission":

            def refuse(*_: object, **__: object) -> str:
                raise PermissionError(errno.EACCES, "read-only file system")

            monkeypatch.setattr("river_llm.store.tempfile.mkdtemp", refuse)
        elif reason == "full at last":

            def fill(arrays: object, path: Path) -> None:
                path.write_bytes(b"123")
                raise OSError(errno.ENOSPC, "no space left on device")

            monkeypatch.setattr(packed_copy_module, "save_file", fill)
        else:
            monkeypatch.setattr(packed_copy_module, "weight_layout", lambda: None)
        for _ in range(2):
            assert not starts_from_a_copy(loads, model)
        if reason == "no folder":
            assert cache.read_text() == "a file where the folder should be"
        else:
            assert not cache.exists() or list(cache.iterdir()) == []

    def test_an_older_copy_stays_where_a_new_one_cannot_be_written(
        self, model: Path, other: Path, loads: list[object], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        start(model)
        start(other)
        kept = cached_folders()
        usage = type("Usage", (), {"free": 1000})
        with monkeypatch.context() as patched:
            patched.setattr("river_llm.store.shutil.disk_usage", lambda _: usage)
            start(model, ROUNDED)
        assert cached_folders() == kept
        assert starts_from_a_copy(loads, model)


_SCRIPT = """
import json, os, signal, sys
from river_llm import RiverLM

model, fate = sys.argv[1:]
if fate == "killed":
    os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
lm = RiverLM.from_pretrained(model, device="cpu", threads=1)
result = lm.generate("A river's name?", max_new_tokens=16)
heavy = [name for name in ("transformers.modeling_utils", "river_llm.gguf") if name in sys.modules]
print(json.dumps({"tokens": result.tokens, "exits": result.exit_layers, "heavy": heavy}))
"""


def _process(model: Path, fate: str = "whole") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(model), fate],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def _end(process: subprocess.Popen[str]) -> dict[str, Any]:
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    answer: dict[str, Any] = json.loads(output)
    return answer


def _answer(model: Path) -> dict[str, Any]:
    lm = start_without_cache(model, policy=None)
    result = lm.generate(PROMPT, max_new_tokens=16)
    return {"tokens": result.tokens, "exits": result.exit_layers}


class TestProcesses:
    def test_that_start_at_once_answer_alike_and_the_next_needs_no_model_of_transformers(
        self, model: Path, cache: Path
    ) -> None:
        expected = _answer(model)
        for process in [_process(model), _process(model)]:
            answer = _end(process)
            assert {name: answer[name] for name in expected} == expected
        (folder,) = cached_folders()
        assert folder.is_whole()
        assert list(cache.iterdir()) == [folder.directory]
        assert _end(_process(model)) == {**expected, "heavy": []}

    def test_that_are_killed_while_they_write_leave_nothing_that_is_read(
        self, model: Path, cache: Path, loads: list[object]
    ) -> None:
        process = _process(model, "killed")
        process.communicate(timeout=120)
        assert process.returncode == -9
        (staging,) = cache.iterdir()
        assert staging.name.startswith(STAGING_PREFIX)
        assert (staging / MANIFEST_NAME).exists()  # it was all but done
        assert cached_folders() == []
        assert not starts_from_a_copy(loads, model)
        assert staging.exists()  # for all we know it is being written
        os.utime(staging, (0, 0))
        start(model, ROUNDED)
        assert not staging.exists()
        assert starts_from_a_copy(loads, model)
