"""The commands, and how their errors reach the user."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from contextlib import suppress
from typing import NoReturn

import typer

from river_llm.cli.bench import bench
from river_llm.cli.build import build
from river_llm.cli.cache import cache
from river_llm.cli.chat import chat
from river_llm.cli.check_exact import check_exact
from river_llm.cli.eval import evaluate
from river_llm.cli.generate import generate
from river_llm.cli.imports import let_waiting_threads_sleep
from river_llm.cli.inspect import inspect
from river_llm.cli.options import print_version
from river_llm.cli.streams import escape_what_stdout_lacks, note
from river_llm.cli.tune import tune
from river_llm.errors import InterruptedRunError, RiverError

_INTERRUPTED = 130  # as shells have it: 128 and the number of SIGINT

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
app.command()(tune)
app.command()(bench)
app.command()(check_exact)
app.command(
    "eval",
    add_help_option=False,  # lm-eval has its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)(evaluate)
app.command()(cache)


class _Warnings(logging.Handler):
    """What the library warns of, as the program's own lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print it on stderr."""
        note(record.getMessage())


def main() -> None:
    """Run the command line; every error that a user can fix is one line on stderr."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # the libraries' bars; ours are rich's
    logging.getLogger("river_llm").handlers = [_Warnings(logging.WARNING)]
    let_waiting_threads_sleep()
    if sys.stdout is None:
        _fail("standard output is closed; there is nowhere to write to")
    escape_what_stdout_lacks()
    try:
        code = app(standalone_mode=False)
        if code == _INTERRUPTED:  # what typer makes of Ctrl-C
            raise KeyboardInterrupt
        sys.stdout.flush()  # while an error can still be told
        sys.exit(code)
    except InterruptedRunError as error:
        _fail(str(error), _INTERRUPTED)
    except RiverError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        _fail("interrupted", _INTERRUPTED)
    except BrokenPipeError:  # the reader has gone
        _drop_stdout()
        sys.exit(1)
    except Exception as error:
        usage_message = getattr(error, "format_message", None)
        if usage_message is not None:  # the parser's own: an unknown option, a missing argument
            message = " ".join(usage_message().split())
            _fail(f"{message} (--help shows what there is)", code=2)
        if isinstance(error, OSError) and _is_of_stdout(error):
            _drop_stdout()
            _fail(f"can't write the answer: {error.strerror or error}")
        if os.environ.get("RIVER_LLM_DEBUG"):
            raise
        _fail(_explain(error))


def _is_of_stdout(error: OSError) -> bool:
    """Whether an error came while an answer was printed, by the module that it was raised in."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    module = frame.f_globals.get("__name__", "")
    return error.filename is None and module.startswith(("river_llm.cli.", "rich."))


def _drop_stdout() -> None:
    """Keep Python from writing to stdout at its end."""
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _explain(error: Exception) -> str:
    from river_llm.load.errors import is_out_of_memory

    if is_out_of_memory(error):
        return "not enough memory; shorten the prompt, or take a smaller model"
    text = " ".join(str(error).split())
    return f"internal error: {type(error).__name__}: {text} (RIVER_LLM_DEBUG=1 shows where)"


def _fail(message: str, code: int = 1) -> NoReturn:
    note(message)
    sys.exit(code)
