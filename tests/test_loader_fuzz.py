"""Damaged model files give a model or one line, and no crash; see `loader_fuzz`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import loader_fuzz
import pytest

from river_llm.store import ENVIRONMENT_VARIABLE

# A hundred inputs take two seconds.
COUNT = int(os.environ.get("RIVER_LLM_FUZZ_INPUTS", "20000"))
PROGRAM = Path(loader_fuzz.__file__)


@pytest.fixture(autouse=True)
def _no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")


def test_damaged_files_give_a_model_or_one_line(tmp_path: Path) -> None:
    whole = loader_fuzz.whole_folder(tmp_path)
    outcomes = {loader_fuzz.outcome(whole, seed) for seed in range(300)}
    assert "loaded" in outcomes
    assert len(outcomes) > 5


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_many_damaged_files_give_a_model_or_one_line(part: int) -> None:
    count = COUNT // 4
    arguments = [sys.executable, str(PROGRAM), str(1000 + part * count), str(count)]
    done = subprocess.run(arguments, capture_output=True, text=True, errors="replace")
    assert done.returncode == 0, done.stderr[-2000:]
