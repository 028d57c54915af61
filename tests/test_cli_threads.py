"""PyTorch's threads, started by the command line, don't keep the core that another one needs."""

from __future__ import annotations

import os
import re
import sys

import pytest
from command_line import run_process

from river_llm.cli.imports import let_waiting_threads_sleep


def chosen(monkeypatch: pytest.MonkeyPatch, *arguments: str, **variables: str) -> str | None:
    """GOMP_SPINCOUNT as the command line leaves it."""
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["river-llm", *arguments])
        for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        let_waiting_threads_sleep()
        return os.environ.pop("GOMP_SPINCOUNT", None)


def test_the_environment_decides_if_it_says_how_threads_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert int(chosen(monkeypatch, "generate") or 0) > 0
    assert chosen(monkeypatch, "generate", GOMP_SPINCOUNT="7") == "7"
    assert chosen(monkeypatch, "generate", OMP_WAIT_POLICY="active") is None


@pytest.mark.skipif(sys.platform != "linux", reason="PyTorch has libgomp on Linux")
def test_it_is_said_before_pytorch_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_DISPLAY_ENV", "verbose")
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    command = ("generate", "Hi", "--exit-layer", 3, "-m", "no-such-model")
    found = re.search(r"GOMP_SPINCOUNT = '(\d+)'", run_process(*command).stderr)
    assert found
    assert found[1] == chosen(monkeypatch, "generate")
