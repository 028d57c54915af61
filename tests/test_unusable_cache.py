"""A cache folder that can't be written: the answer is the same, and one warning says why the next
start is slow."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from packed_models import PROMPT
from tiny_lm import character_tokenizer
from transformers import PreTrainedModel

from river_llm import RiverConfig, RiverLM, store
from river_llm.store import ENVIRONMENT_VARIABLE

CONFIG = RiverConfig(group_size=32, quantizer="rtn")


@pytest.fixture
def directory(tiny_llama: PreTrainedModel, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    tiny_llama.save_pretrained(path)
    character_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def _forgetful() -> None:
    store._told.clear()


def _warnings(directory: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What two starts tell."""
    for _ in range(2):
        lm = RiverLM.from_pretrained(directory, CONFIG, engine="cpu")
        assert len(lm.generate(PROMPT, max_new_tokens=3).tokens) == 3
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_that_is_a_file_is_told_once(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    taken = tmp_path / "taken"
    taken.touch()
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(taken))
    (message,) = _warnings(directory, caplog)
    assert message.startswith(f"nothing can be kept in the cache {taken} (")
    assert message.endswith("; set RIVER_LLM_CACHE to a folder that can be written, or to off")
    assert "\n" not in message


def test_without_room_is_told(
    directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    usage = store.shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr("river_llm.store.shutil.disk_usage", lambda _: usage)
    (message,) = _warnings(directory, caplog)
    assert "more than half of the space that is left" in message


@pytest.mark.parametrize("chosen", ["off", "cache"])
def test_is_nothing_to_tell_where_it_is_off_or_works(
    directory: Path,
    chosen: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, chosen)
    assert _warnings(directory, caplog) == []
    assert (tmp_path / "cache").is_dir() == (chosen == "cache")
