"""`river-llm lm-eval`: lm-eval's own command line, which knows the model `river-llm` here."""

from __future__ import annotations

import os
import sys
from functools import partial
from importlib import import_module

import typer


def lm_eval(context: typer.Context) -> None:
    """Run lm-eval, EleutherAI's harness, on its tasks: the arguments are lm-eval's, and `--model
    river-llm` is known to it. docs/evaluation.md has examples."""
    from river_llm.cli.progress import SECONDS, ProgressLines
    from river_llm.cli.render import stderr
    from river_llm.evaluation.extras import import_extra

    os.environ.pop("TQDM_DISABLE", None)  # its progress bars are tqdm's
    if not stderr.is_terminal:
        for setting in ("TQDM_DELAY", "TQDM_MININTERVAL"):
            os.environ.setdefault(setting, str(SECONDS))
    command = import_extra("lm_eval.__main__", "river-llm lm-eval")
    import_module("river_llm.evaluation.lm_eval_model")
    sys.argv = ["lm-eval", *context.args]
    from tqdm import tqdm  # it reads its settings when it is imported

    with ProgressLines("running lm-eval", partial(tqdm.write, file=sys.stderr)):
        command.cli_evaluate()
