"""Options that are no settings of a model or an answer, and that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from river_llm.cli.settings_options import ADVANCED

_MODEL_HELP = "A model directory, a GGUF file, a Hub id (org/name), or smollm2."

ModelArgument = Annotated[str, typer.Argument(help=_MODEL_HELP, show_default=True)]
Model = Annotated[str, typer.Option("--model", "-m", help=_MODEL_HELP)]
RiverPath = Annotated[
    Path | None,
    typer.Option(
        "--river",
        help="The folder of a river made by `river-llm build`; without it one is built anew.",
    ),
]
PromptCacheFile = Annotated[
    Path | None,
    typer.Option(
        "--prompt-cache",
        help="Read the prefix of the prompt from this file, as far as it is the same, and keep "
        "the prompt there for the next time.",
        rich_help_panel=ADVANCED,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from river_llm import __version__

        print(f"river-llm {__version__}")
        raise typer.Exit


print_version = typer.Option(
    False, "--version", callback=_print_version, is_eager=True, help="Print the version."
)
