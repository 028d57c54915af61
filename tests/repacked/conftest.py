"""A store of its own for each test, and a model in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from stored_models import (
    save_model,
)

from river_llm.load.model import load_backbone
from river_llm.store import (
    ENVIRONMENT_VARIABLE,
)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, str(directory))
    monkeypatch.delenv("RIVER_LLM_CPU", raising=False)
    return directory


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that no test changes."""
    return save_model(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return save_model(tmp_path_factory.mktemp("saved") / "tiny", seed=1)


@pytest.fixture
def model(saved: Path, tmp_path: Path) -> Path:
    """The test's own."""
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Grows with every model that is loaded for an engine."""
    loaded: list[object] = []

    def load(name_or_path: Any, *arguments: Any) -> Any:
        loaded.append(name_or_path)
        return load_backbone(name_or_path, *arguments)

    monkeypatch.setattr("river_llm.load.pretrained.load_backbone", load)
    return loaded
