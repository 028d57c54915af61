"""How far a command is stands on stderr, where it is no terminal too."""

from __future__ import annotations

import contextlib
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
from river_llm.cli.progress import LoadingProgress, ProgressLines

WORDS = "The river runs past the mill and under the old stone bridge.\n" * 12
BUILDING = r"building the exit river \d of 4"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a model with a token for each byte."""
    return str(save_folder(tmp_path_factory.mktemp("progress") / "model", byte_model()))


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line every twentieth of a second, as for work that takes minutes."""
    monkeypatch.setattr(progress, "SECONDS", 0.05)
    monkeypatch.delenv(progress.ENVIRONMENT_VARIABLE)


@contextlib.contextmanager
def told(lines: list[str]) -> Iterator[None]:
    """Fills `lines` with what stderr gets meanwhile."""
    output = io.StringIO()
    with contextlib.redirect_stderr(output):
        yield
    lines += output.getvalue().splitlines()


def wait_for(lines: int, output: list[str]) -> None:
    deadline = time.monotonic() + 20
    while len(output) < lines and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.mark.usefixtures("often")
class TestLines:
    def test_have_the_work_its_steps_and_the_time(self) -> None:
        output: list[str] = []
        with ProgressLines("reading", output.append) as lines:
            wait_for(1, output)
            lines.done, lines.total = 12, 30
            wait_for(len(output) + 2, output)
        assert re.fullmatch(r"river-llm: reading, \d+ s", output[0])
        assert re.fullmatch(r"river-llm: reading 12 of 30, \d+ s", output[-1])

    def test_end_with_the_work(self) -> None:
        output: list[str] = []
        with ProgressLines("reading", output.append):
            wait_for(1, output)
        before = len(output)
        time.sleep(0.2)
        assert len(output) == before
        assert not any(thread.name == "river-llm progress" for thread in threading.enumerate())

    def test_are_none_where_the_work_is_done_sooner(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(progress, "SECONDS", 60)
        output: list[str] = []
        started = time.monotonic()
        with ProgressLines("reading", output.append):
            pass
        assert output == []
        assert time.monotonic() - started < 10

    def test_are_none_where_they_are_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(progress.ENVIRONMENT_VARIABLE, "off")
        output: list[str] = []
        with ProgressLines("reading", output.append):
            time.sleep(0.2)
        assert output == []

    def test_are_none_on_a_terminal(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = io.StringIO()
        monkeypatch.setattr(progress, "stderr", Console(file=terminal, force_terminal=True))
        with LoadingProgress("reading") as shown:
            shown.steps_done(1, 2)
            time.sleep(0.2)
        assert "reading" in terminal.getvalue()  # the bar
        assert "river-llm" not in terminal.getvalue()

    def test_stop_where_nobody_reads(self) -> None:
        def fail(line: str) -> None:
            raise BrokenPipeError

        with ProgressLines("reading", fail):
            time.sleep(0.2)

    def test_are_left_to_another_meanwhile(self) -> None:
        output: list[str] = []
        with told(output), LoadingProgress("comparing") as shown, shown.paused():
            time.sleep(0.2)
        assert output == []


@pytest.mark.usefixtures("often")
class TestCommand:
    """Every phase that takes its time says what it is."""

    @pytest.fixture(autouse=True)
    def _slow(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Rivers are built and answers computed no faster than a layer or a token in 0.1 s."""
        build, stream = River.build, RiverLM.stream_tokens

        def slow_build(model: Any, config: Any, done: Callable[[int, int], None]) -> River:
            def slowly(layers: int, total: int) -> None:
                done(layers, total)
                time.sleep(0.1)

            return build(model, config, slowly)

        def slow_stream(self: RiverLM, *args: Any, **options: Any) -> Iterator[Any]:
            for response in stream(self, *args, **options):
                yield response
                time.sleep(0.1)

        monkeypatch.setenv("RIVER_LLM_CACHE", "off")
        monkeypatch.setattr(River, "build", slow_build)
        monkeypatch.setattr(RiverLM, "stream_tokens", slow_stream)

    @pytest.mark.parametrize(
        ("command", "phases"),
        [
            ("generate -m MODEL -n 3 --json Hi", [BUILDING, r"answering \d of 3"]),
            ("generate -m MODEL -n 3 --compare Hi", [BUILDING, "comparing"]),
            ("build MODEL -o river", [BUILDING]),
            ("inspect MODEL --text-file TEXT", [BUILDING]),
            ("check-exact MODEL -n 64 --prompts TEXT", [BUILDING, r"answering \d+ of 12"]),
            (
                "bench -m MODEL --prompt-tokens 0 --new-tokens 32 --rounds 1",
                [BUILDING, r"timing .* \d of 4"],
            ),
        ],
        ids=lambda value: value.split()[0] if isinstance(value, str) else "",
    )
    def test_tells_how_far_it_is(
        self,
        command: str,
        phases: list[str],
        model: str,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("text.txt").write_text(WORDS)
        names = {"MODEL": model, "TEXT": "text.txt"}
        arguments = [names.get(word, word) for word in command.split()]
        outcome = run(*arguments, "--group-size", 32)
        assert outcome.exit_code == 0, outcome.stderr
        for phase in phases:
            assert re.search(rf"^river-llm: {phase}, \d+ s$", outcome.stderr, re.MULTILINE)
