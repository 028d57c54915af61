"""`river-llm eval`: lm-eval's own command line, which knows the model `river-llm` here."""

from __future__ import annotations

import os
import sys
from importlib import import_module

import typer

from river_llm.errors import ConfigError, MissingExtraError

_SUBCOMMANDS = ("run", "ls", "validate")
_NAMES_MODEL = ("--model", "-M", "--config", "-C")


def evaluate(context: typer.Context) -> None:
    """Run the tasks of lm-eval (EleutherAI's harness): all arguments are lm-eval's own, and --model
    is river-llm unless they say otherwise. docs/evaluation.md has examples.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ConfigError: lm-eval refuses an argument.
    """
    os.environ.pop("TQDM_DISABLE", None)  # its progress bars are tqdm's
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    try:
        command = import_module("lm_eval.__main__")
        import_module("river_llm.measure.lm_eval_model")
    except ImportError as error:
        raise MissingExtraError(
            f"river-llm eval needs lm-eval ({error}); install it with pip install 'river-llm[eval]'"
        ) from error
    sys.argv = ["lm-eval", *with_model(context.args)]
    try:
        command.cli_evaluate()
    except (ValueError, KeyError, FileNotFoundError) as error:
        if os.environ.get("RIVER_LLM_DEBUG"):
            raise
        reason = " ".join(str(error).split())
        raise ConfigError(f"lm-eval: {reason} (RIVER_LLM_DEBUG=1 shows where)") from error


def with_model(arguments: list[str]) -> list[str]:
    """lm-eval's arguments, with the model `river-llm` where they name none; without arguments, its
    help."""
    subcommand = [one for one in arguments[:1] if one in _SUBCOMMANDS]
    rest = arguments[len(subcommand) :]
    is_named = any(one.partition("=")[0] in _NAMES_MODEL for one in rest)
    if subcommand[:1] not in ([], ["run"]) or is_named:
        return arguments
    return ["run", "--model", "river-llm", *(rest or ["--help"])]
