"""The commands, and how their errors reach the user."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import typer

from river_llm.cli.bench import bench
from river_llm.cli.build import build
from river_llm.cli.cache import cache
from river_llm.cli.chat import chat
from river_llm.cli.check_exact import check_exact
from river_llm.cli.compare import compare
from river_llm.cli.eval import evaluate
from river_llm.cli.generate import generate
from river_llm.cli.inspect import inspect
from river_llm.cli.lm_eval import lm_eval
from river_llm.cli.options import print_version
from river_llm.cli.reproduce import reproduce
from river_llm.errors import RiverError

app = typer.Typer(
    name="river-llm",
    help="Text through the exit river: tokens leave the backbone when they hardly change any more.",
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _options(version: bool = print_version) -> None:
    """Options of the program itself."""


app.command()(build)
app.command()(generate)
app.command()(chat)
app.command()(inspect)
app.command()(bench)
app.command()(check_exact)
app.command("eval")(evaluate)
app.command(
    "lm-eval",
    add_help_option=False,  # lm-eval has its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(lm_eval)
app.command()(compare)
app.command()(reproduce)
app.command()(cache)


def main() -> None:
    """Run the command line; every error that a user can mend is one line on stderr."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; ours are rich's
    try:
        sys.exit(app(standalone_mode=False))
    except RiverError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted")
    except BrokenPipeError:  # the reader has gone; keep Python from writing to it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        usage_message = getattr(error, "format_message", None)
        if usage_message is not None:  # the parser's own: an unknown option, a missing argument
            _fail(" ".join(usage_message().split()) + " (--help shows what there is)", code=2)
        if os.environ.get("RIVER_LLM_DEBUG"):
            raise
        _fail(_explain(error))


def _explain(error: Exception) -> str:
    from river_llm.loading import is_out_of_memory

    if is_out_of_memory(error):
        return "not enough memory; shorten the prompt, or take a smaller model"
    text = " ".join(str(error).split())
    return f"internal error: {type(error).__name__}: {text} (RIVER_LLM_DEBUG=1 shows where)"


def _fail(message: str, code: int = 1) -> NoReturn:
    print(f"river-llm: {message}", file=sys.stderr)
    sys.exit(code)
