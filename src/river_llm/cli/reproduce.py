"""`river-llm reproduce`: the paper's tables for a model, our figures beside the paper's."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from river_llm.cli import options
from river_llm.cli.lists import listed, numbers
from river_llm.cli.loading import LoadOptions, load, prepare_torch
from river_llm.cli.reproduce_list import list_paper
from river_llm.cli.settings import river_config
from river_llm.cli.streams import print_json
from river_llm.cli.usage import given_options, refuse_idle, usage_error
from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from river_llm.report.document import Block
    from river_llm.reproduction.paper import PaperModel, PaperTask

_TASKS = options.TASKS


def reproduce(
    context: typer.Context,
    paper_model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="One of the paper's, see --list.", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Where its weights are, or another model to run the paper's tasks on: a model "
            "directory, a GGUF file, a Hub id, or smollm2. \\[default: the paper's, from the Hub]",
        ),
    ] = None,
    as_model: Annotated[
        str | None,
        typer.Option(
            "--as",
            help="Run another model at the thresholds of this one of the paper's, whose figures "
            "then stand beside for orientation.",
        ),
    ] = None,
    list_models: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Print the paper's models, tasks and figures, or those of MODEL, and run nothing.",
        ),
    ] = False,
    tasks: Annotated[
        str,
        typer.Option(
            help="Some of gsm8k, math500, humaneval, boolq, hellaswag, arc_easy, arc_challenge, "
            "mmlu. \\[default: all that can run]",
            rich_help_panel=_TASKS,
        ),
    ] = "",
    limit: options.TaskLimit = None,
    thresholds: Annotated[
        str,
        typer.Option(
            help="One River arm each. \\[default: the paper's for the model, see --list]",
            rich_help_panel=_TASKS,
        ),
    ] = "",
    prefill: Annotated[
        options.PrefillName,
        typer.Option(
            help="How prompts run in River's arms; sequence is the paper's.",
            rich_help_panel=_TASKS,
        ),
    ] = options.PrefillName.sequence,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens",
            "-n",
            min=1,
            help="Of a generated answer. \\[default: gsm8k and humaneval 512, math500 1024]",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    data_dir: options.DataDir = None,
    allow_code_execution: Annotated[
        bool,
        typer.Option(
            "--allow-code-execution",
            help="Let humaneval run the model's programs, confined; without it humaneval is left "
            "out.",
            rich_help_panel=_TASKS,
        ),
    ] = False,
    batch_size: options.BatchSize = 8,
    no_speed: options.NoSpeed = False,
    speed_tokens: options.SpeedTokens = 256,
    rounds: options.Rounds = 5,
    measure_memory: Annotated[
        bool,
        typer.Option(
            "--measure-memory",
            help="Measure it at 64K tokens, or as many as the model takes, beside the arithmetic "
            "(native engine).",
            rich_help_panel="Memory",
        ),
    ] = False,
    output: options.ReportFolder = Path("reproduction"),
    restart: options.Restart = False,
    json_output: options.Json = False,
    river: options.RiverPath = None,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    engine: options.Engine = options.EngineName.auto,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    device: options.Device = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Run the paper's tasks on a model: backbone, all layers in 4 bits and River at the paper's
    thresholds, on one engine, and write a report with the paper's figures beside. A run that was
    cut short goes on with the same command."""
    if list_models:
        refuse_idle(context, "--list runs nothing", given_options(context) - {"--list", "--json"})
        _list(paper_model, json_output)
        return
    if no_speed:  # memory is measured in rounds, too
        idle = {"--speed-tokens"} if measure_memory else {"--speed-tokens", "--rounds"}
        refuse_idle(context, "--no-speed measures none", idle)
    reference, name = _chosen(paper_model, model, as_model)
    named = listed(tasks)
    wanted = _tasks(named)
    taus = _thresholds(thresholds, reference)
    made = river_config(river, 4, group_size, quantizer)
    prepare_torch(threads)
    from river_llm.load.model import empty_model, load_config

    is_reference = paper_model is not None
    config = load_config(name, trust_remote_code)
    if is_reference and reference is not None:
        _check_shape(config, name, reference)
    empty = empty_model(config, name, trust_remote_code)
    from river_llm.exit_policy import ExitPolicy
    from river_llm.reproduction.availability import runnable

    can_run, left_out = runnable(wanted, data_dir, allow_code_execution, bool(named))
    for task, reason in left_out.items():
        print(f"river-llm: {task} is left out: {reason}", file=sys.stderr)
    lm = load(
        LoadOptions(
            model=name,
            river=made,
            policy=ExitPolicy.never(),
            dtype=dtype,
            device=device,
            threads=threads,
            trust_remote_code=trust_remote_code,
            engine=engine,
        )
    )
    from river_llm.benchmark.bandwidth import read_bandwidth
    from river_llm.benchmark.environment import usable_cores
    from river_llm.cli.progress import LoadingProgress
    from river_llm.evaluation.requests import TaskSettings
    from river_llm.report.arms import BACKBONE, Variant
    from river_llm.report.models import Models
    from river_llm.reproduction.memory import ModelSizes
    from river_llm.reproduction.plan import Plan
    from river_llm.reproduction.run import reproduce as run_reproduction
    from river_llm.reproduction.writing import write_report
    from river_llm.river_lm import RiverLM

    plan = Plan(
        reference=reference,
        is_reference=is_reference,
        tasks=can_run,
        left_out=left_out,
        settings=TaskSettings(
            model=name,
            limit=limit,
            max_new_tokens=max_new_tokens,
            data_dir=data_dir,
            allow_code_execution=allow_code_execution,
        ),
        thresholds=taus,
        prefill=prefill.value,
        with_speed=not no_speed,
        speed_tokens=speed_tokens,
        rounds=rounds,
        measures_memory=measure_memory,
        batch_size=batch_size,
        restart=restart,
    )

    def load_variant(variant: Variant) -> RiverLM:
        raise AssertionError(f"all arms run on one model, not on {variant}")

    assert lm.river_config is not None  # no other strategy is asked for
    sizes = ModelSizes.of(empty, lm.river_config)
    models = Models(load_variant, {BACKBONE.variant: lm})
    del lm  # `models` alone holds it, and lets go of it where memory is measured
    with LoadingProgress("reproducing") as progress:
        reproduction = run_reproduction(
            plan,
            models,
            sizes,
            output,
            read_bandwidth,
            threads or usable_cores(),
            progress.work_done,
        )
        summary, beginning = write_report(reproduction, output)
    if json_output:
        print_json(summary)
    else:
        _show(beginning, output)


def _list(paper_model: str | None, json_output: bool) -> None:
    """Print what the paper reports, of all its models or of one.

    Raises:
        typer.Exit: the paper has no such model.
    """
    from river_llm.reproduction.paper import MODELS, find_model

    try:
        models = MODELS if paper_model is None else (find_model(paper_model),)
    except ConfigError as error:
        raise usage_error(str(error)) from error
    list_paper(models, paper_model is None, json_output)


def _chosen(
    paper_model: str | None, model: str | None, as_model: str | None
) -> tuple[PaperModel | None, str]:
    """Whose figures stand beside, and what runs.

    Raises:
        typer.Exit: the paper has no such model, or the three contradict each other.
    """
    from river_llm.reproduction.paper import find_model

    if paper_model is not None and as_model is not None:
        raise usage_error("give MODEL or --as: --as is for a model that the paper doesn't have")
    if as_model is not None and model is None:
        raise usage_error(f"--as {as_model} needs --model: what runs at its thresholds")
    if paper_model is None and model is None:
        raise usage_error("give one of the paper's models (--list shows them), or --model")
    named = paper_model or as_model
    try:
        reference = None if named is None else find_model(named)
    except ConfigError as error:
        raise usage_error(str(error)) from error
    if model is not None:
        return reference, model
    assert reference is not None
    return reference, reference.hub


def _tasks(named: list[str]) -> list[PaperTask]:
    from river_llm.reproduction.paper import find_tasks

    try:
        return find_tasks(named)
    except ConfigError as error:
        raise usage_error(str(error)) from error


def _thresholds(given: str, reference: PaperModel | None) -> list[float]:
    """The given ones, else those of the paper for its model.

    Raises:
        typer.Exit: they are no numbers, or one is no cosine.
    """
    from river_llm.exit_policy import ExitPolicy
    from river_llm.reproduction.paper import DEFAULT_THRESHOLDS

    taus = sorted(numbers("--thresholds", given, float))
    if given and not taus:
        raise usage_error("give one threshold or more")
    if not taus:
        return list(reference.thresholds if reference is not None else DEFAULT_THRESHOLDS)
    try:
        for tau in taus:
            ExitPolicy.similarity(tau)
    except ConfigError as error:
        raise usage_error(str(error)) from error
    return taus


def _check_shape(config: PretrainedConfig, name: str, reference: PaperModel) -> None:
    """See that a model may be the paper's, before its weights are loaded.

    Raises:
        ConfigError: it has another shape.
    """
    found = config.num_hidden_layers, config.hidden_size
    wanted = reference.num_layers, reference.hidden_size
    if found != wanted:
        raise ConfigError(
            f"{name} has {found[0]} layers of width {found[1]}, {reference.title} has {wanted[0]} "
            f"of {wanted[1]}: these are other weights; --as {reference.name} --model {name} runs "
            "them at its thresholds"
        )


def _show(blocks: Sequence[Block], output: Path) -> None:
    """The beginning of the report: paragraphs and a table."""
    from rich import table
    from rich.console import Console
    from rich.text import Text

    from river_llm.cli.render import stdout
    from river_llm.report.document import Paragraph, Table

    for block in blocks:
        if isinstance(block, Paragraph):
            stdout.print(block.text)
        elif isinstance(block, Table):
            shown = table.Table(box=None, pad_edge=False)
            for place, heading in enumerate(block.headings):
                shown.add_column(heading, justify="right" if place else "left", no_wrap=True)
            for row in block.rows:
                shown.add_row(*map(Text, row))
            Console(width=200, highlight=False, markup=False).print(shown)
    stdout.print(f"{output / 'report.html'}, report.md, report.json")
