"""How far a command is stands on stderr, where it is no terminal too."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_model, save_folder
from command_line import run
from rich.console import Console

from river_llm import River, RiverLM
from river_llm.cli import progress
from river_llm.cli.progress import LoadingProgress

WORDS = "The river runs past the mill and under the old stone bridge.\n" * 12
BUILDING = r"building the exit river \d of 4"


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every twentieth of a second, as for work that takes minutes."""
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.delenv(progress.ENVIRONMENT_VARIABLE)


@pytest.mark.parametrize("reason", ["sooner", "off", "terminal"])
def test_there_are_no_lines(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=reason == "terminal")
    monkeypatch.setattr(progress, "stderr", console)
    monkeypatch.setattr("sys.stderr", file)
    if reason == "sooner":
        monkeypatch.setattr(progress, "SECONDS", 60)
    if reason == "off":
        monkeypatch.setenv(progress.ENVIRONMENT_VARIABLE, "off")
    started = time.monotonic()
    with LoadingProgress("reading") as shown:
        shown.steps_done(1, 2)
        time.sleep(0.2)
        assert "river-llm" not in file.getvalue()
    assert ("reading" in file.getvalue()) == (reason == "terminal")  # the bar
    assert time.monotonic() - started < 10


def test_lines_stop_where_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(line: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(progress, "note", fail)
    with LoadingProgress("reading"):
        time.sleep(0.2)
        assert not any(thread.name == "river-llm progress" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("command", "phases"),
    [
        ("generate -m MODEL -n 3 --json Hi", [BUILDING, r"answering \d of 3"]),
        ("generate -m MODEL -n 3 --compare Hi", [BUILDING, "comparing"]),
        ("build MODEL -o river", [BUILDING]),
        ("inspect MODEL --text-file text.txt", [BUILDING]),
        ("check-exact MODEL -n 64 --prompts text.txt", [BUILDING, r"answering \d+ of 12"]),
        (
            "bench -m MODEL --prompt-tokens 0 --new-tokens 32 --rounds 1",
            [BUILDING, r"measuring .* \d of 4"],
        ),
    ],
    ids=lambda value: value.split()[0] if isinstance(value, str) else "",
)
def test_every_phase_of_a_command_says_what_it_is(
    command: str, phases: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build, stream = River.build, RiverLM.stream_tokens

    def slow_build(model: Any, config: Any, done: Callable[[int, int], None], text: Any) -> River:
        return build(model, config, lambda *layers: (done(*layers), time.sleep(0.1)), text)

    def slow_stream(self: RiverLM, *args: Any, **options: Any) -> Iterator[Any]:
        for response in stream(self, *args, **options):
            yield response
            time.sleep(0.1)

    monkeypatch.setenv("RIVER_LLM_CACHE", "off")
    monkeypatch.setattr(River, "build", slow_build)
    monkeypatch.setattr(RiverLM, "stream_tokens", slow_stream)
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(WORDS)
    model = save_folder(tmp_path / "model", byte_model())
    outcome = run(*command.replace("MODEL", str(model)).split(), "--group-size", 32)
    assert outcome.exit_code == 0, outcome.stderr
    for phase in phases:
        assert re.search(rf"^river-llm: {phase}, \d+ s$", outcome.stderr, re.MULTILINE)
