"""What the terminal shows is what was meant: no text is taken for markup, none is changed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from command_line import run, run_process
from rich.console import Console

from river_llm.cli import render
<<<<<<< HEAD
from river_llm.measure.comparison import ArmResult
=======
from river_llm.measure.comparison import Compared
from river_llm.measure.rounds import Spread
>>>>>>> main
from river_llm.sizes import format_bytes

pytest_plugins = ["cli_models"]


def shown(pieces: list[str]) -> str:
    """What stdout gets of an answer that comes in `pieces`."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        for piece in pieces:
            render.print_token(piece, 1, 4)
    return output.getvalue()


@pytest.mark.parametrize(
    "pieces",
    [
        ["Hello", ",", " world"],
        ["a", "\n", "\n", "b\n"],
        ["", " ", "", "   ", "\n    "],
        ["[red]", "x", "[/red]", "[/b]", r"\[b]"],
        ["x" * 300, " " * 300, "y " * 200],
        ["é", "河流", "👩‍👩‍👧", "e\u0301"],
        [":smile:", "https://example.org", "123", "'quoted'"],
        ["all:\n", "\tcc a.c\n"],
        ["one\r\n", "two\x0c"],
    ],
    ids=lambda pieces: ascii("".join(pieces))[:20],
)
def test_an_answer_in_a_file_is_the_text_itself(pieces: list[str]) -> None:
    assert shown(pieces) == "".join(pieces)


def test_tokens_are_coloured_from_green_to_red() -> None:
    output = io.StringIO()
    terminal = Console(file=output, force_terminal=True, color_system="truecolor", soft_wrap=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(render, "stdout", terminal)
        for exit_layer in range(5):
            render.print_token("x", exit_layer, 4)
    colours = [
        tuple(map(int, rgb)) for rgb in re.findall(r"38;2;(\d+);(\d+);(\d+)m", output.getvalue())
    ]
    assert len(set(colours)) == 5
    (first_red, first_green, _), (last_red, last_green, _) = colours[0], colours[-1]
    assert first_green > 2 * first_red
    assert last_red > 2 * last_green
    redness = [red - green for red, green, _ in colours]
    assert redness == sorted(redness)


def test_exit_depths_are_counted() -> None:
    output = io.StringIO()
    table = render.exit_depth_table([4, 1, 1, 3, 1, 1], 4)
    Console(file=output, width=100).print(table)
    rows = [line.split() for line in output.getvalue().splitlines()[2:]]
    assert [row[:2] for row in rows] == [["1", "4"], ["3", "1"], ["4", "1"]]
    assert [len(row[2]) for row in rows] == [30, 8, 8]


def test_the_comparison_is_shown_as_measured() -> None:
    variants = [
        Compared("backbone", "never leaves", Spread(10.0, 9.0, 12.0), 4.0, 1.0),
        Compared("River", "exit after 1", Spread(25.0, 20.0, 26.0), 1.25, 0.625),
    ]
    output = io.StringIO()
    Console(file=output, width=100).print(render.comparison_table(variants, 4))
    backbone, river = (
        line for line in output.getvalue().splitlines() if re.search("backbone|River", line)
    )
    for part in ("10.0 [", "1.00x", "4.0 of 4", "100 %"):
        assert part in backbone
    for part in ("25.0 [", "2.50x", "1.2 of 4", "62 %"):
        assert part in river
    assert re.search(r"median \[\w+ - \w+ round\]", output.getvalue())


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (82_944, "81.0 KiB"),
        (294_912, "288 KiB"),
        (3 * 2**20 // 2, "1.5 MiB"),
        (5 * 2**30, "5.0 GiB"),
        (7 * 2**50, "7168 TiB"),
    ],
)
def test_bytes_are_in_units_of_1024(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize("name", ["river[old]", "river[/old]"])
def test_a_path_with_brackets_is_shown_as_it_is(model: str, tmp_path: Path, name: str) -> None:
    outcome = run("build", model, "-o", tmp_path / name)
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.stderr.endswith(f": {tmp_path / name}\n")


@pytest.mark.parametrize(
    ("command", "part"),
    [
        ("generate", "[default: similarity, threshold 0.9]"),
        ("generate", "[default: cuda if any]"),
        ("generate", "[default: all]"),
        ("inspect", "[extra: plot]"),
    ],
)
def test_help_shows_its_brackets(command: str, part: str) -> None:
    words = re.sub(r"[│\s]+", " ", run_process(command, "--help").stdout)
    assert part in words
