"""`river-llm compare`: the arms on tasks, on a text and in speed, and the report of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from river_llm.cli import options
from river_llm.cli.lists import listed, numbers
from river_llm.cli.loading import LoadOptions, load, load_attached
from river_llm.cli.settings import river_config
from river_llm.cli.streams import print_json
from river_llm.cli.usage import refuse_idle, usage_error
from river_llm.errors import ConfigError, DataError
from river_llm.text.utf8 import read_text

if TYPE_CHECKING:
    from river_llm.attachment import AttachedRiver
    from river_llm.config import Strategy
    from river_llm.report.arms import Variant
    from river_llm.river_lm import RiverLM

_ARMS, _TASKS = "Arms", options.TASKS


def compare(
    context: typer.Context,
    model: options.ModelArgument = "smollm2",
    tasks: Annotated[
        str,
        typer.Option(
            help="Names of tasks with answers, see `river-llm eval`; '' for none.",
            rich_help_panel=_TASKS,
        ),
    ] = "arc_easy,blimp",
    limit: options.TaskLimit = None,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Measure the divergence from the backbone on this text, and read layers and "
            "speed along it. \\[default: speed and layers along the benchmark's own prose]",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option(min=1, help="Windows of the text at most.", rich_help_panel=_TASKS)
    ] = 8,
    window: Annotated[
        int, typer.Option(min=4, help="Tokens of a window.", rich_help_panel=_TASKS)
    ] = 512,
    shots: Annotated[
        int | None,
        typer.Option(min=0, help="Solved examples in the prompt.", rich_help_panel=_TASKS),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", "-n", min=1, help="Of a generated answer.", rich_help_panel=_TASKS
        ),
    ] = None,
    data_dir: options.DataDir = None,
    allow_code_execution: options.AllowCodeExecution = False,
    batch_size: options.BatchSize = 8,
    thresholds: Annotated[
        str, typer.Option(help="One similarity arm each.", rich_help_panel=_ARMS)
    ] = "0.9,0.95,0.97,0.98,0.99",
    exit_layers: Annotated[
        str,
        typer.Option(
            help="One arm of fixed depth each, beside those at the similarity arms' own depths.",
            rich_help_panel=_ARMS,
        ),
    ] = "",
    strategies: Annotated[
        str,
        typer.Option(
            help="Of mask, recompute, propagate and monotonic: each at every threshold and exit "
            "layer, on the torch engine, where backbone and river are timed beside them.",
            rich_help_panel=_ARMS,
        ),
    ] = "",
    no_random: Annotated[
        bool,
        typer.Option(
            "--no-random",
            help="Leave out random routing, which runs token by token.",
            rich_help_panel=_ARMS,
        ),
    ] = False,
    seed: Annotated[
        int,
        typer.Option(min=0, max=2**63 - 1, help="Of random routing.", rich_help_panel=_ARMS),
    ] = 0,
    no_speed: options.NoSpeed = False,
    speed_tokens: options.SpeedTokens = 256,
    rounds: options.Rounds = 5,
    output: options.ReportFolder = Path("comparison"),
    restart: options.Restart = False,
    json_output: options.Json = False,
    river: options.RiverPath = None,
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    engine: options.Engine = options.EngineName.auto,
    kv_bits: options.KvBits = options.WeightBits.sixteen,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    device: options.Device = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compare backbone, full quantisation, fixed depths, similarity exits, random routing and other
    strategies on tasks and in speed, and write a report. A run that was cut short goes on with the
    same command."""
    names = listed(tasks)
    taus = sorted(numbers("--thresholds", thresholds, float))
    layers = sorted(numbers("--exit-layers", exit_layers, int))
    others = listed(strategies)
    _check(names, taus, layers, others, text)
    if others and kv_bits is not options.WeightBits.sixteen:
        raise usage_error(
            "--strategies keep their KV cache in the model's dtype; leave --kv-bits out"
        )
    if no_random:
        refuse_idle(context, "--no-random leaves random routing out", {"--seed"})
    if no_speed:
        refuse_idle(context, "--no-speed measures none", {"--speed-tokens", "--rounds"})
    made = river_config(river, bits, group_size, quantizer)
    from river_llm.config import RiverConfig
    from river_llm.exit_policy import ExitPolicy

    never = ExitPolicy.never()

    def loading(variant: Variant | None = None) -> LoadOptions:
        own, own_engine, strategy = made, engine, options.StrategyName.river
        if variant is not None:
            if variant.bits is not None:
                own = RiverConfig(variant.bits, group_size, quantizer.value)
            own_engine = options.EngineName(variant.engine or engine)
            strategy = options.StrategyName(variant.strategy)
        return LoadOptions(
            model=model,
            river=own,
            policy=never,
            dtype=dtype,
            device=device,
            threads=threads,
            trust_remote_code=trust_remote_code,
            engine=own_engine,
            kv_bits=kv_bits,
            strategy=strategy,
        )

    first = load(loading())
    from river_llm.benchmark.bandwidth import read_bandwidth
    from river_llm.benchmark.environment import usable_cores
    from river_llm.cli.progress import LoadingProgress
    from river_llm.evaluation.requests import TaskSettings
    from river_llm.report.arms import BACKBONE
    from river_llm.report.compare import Plan
    from river_llm.report.compare import compare as run_comparison
    from river_llm.report.models import Models
    from river_llm.report.writing import write_report

    plan = Plan(
        tasks=names,
        settings=TaskSettings(
            model=model,
            limit=limit,
            shots=shots,
            max_new_tokens=max_new_tokens,
            text=text,
            window=window,
            data_dir=data_dir,
            allow_code_execution=allow_code_execution,
        ),
        windows=windows,
        thresholds=taus,
        exit_layers=layers,
        strategies=cast("list[Strategy]", others),
        with_random=not no_random,
        with_speed=not no_speed,
        speed_tokens=speed_tokens,
        rounds=rounds,
        seed=seed,
        batch_size=batch_size,
        restart=restart,
    )
    with LoadingProgress("comparing") as progress:

        def load_variant(variant: Variant) -> RiverLM:
            with progress.paused():
                return load(loading(variant))

        def attached() -> AttachedRiver:
            with progress.paused():
                return load_attached(loading())[0]

        comparison = run_comparison(
            plan,
            Models(load_variant, {BACKBONE.variant: first}),
            attached,
            output,
            read_bandwidth,
            threads or usable_cores(),
            progress.work_done,
        )
        summary = write_report(comparison, output)
    if json_output:
        print_json(summary)
    else:
        _show(summary, output)


def _check(
    tasks: list[str],
    thresholds: list[float],
    layers: list[int],
    strategies: list[str],
    text: Path | None,
) -> None:
    """See that the options go together, before a model is loaded.

    Raises:
        typer.Exit: they don't.
    """
    from river_llm.evaluation.tasks import TEXT_TASKS, check_task
    from river_llm.exit_policy import ExitPolicy
    from river_llm.plots import has_matplotlib
    from river_llm.strategies import STRATEGIES

    try:
        for name in tasks:
            check_task(name)
        for threshold in thresholds:
            ExitPolicy.similarity(threshold)
        for layer in layers:
            ExitPolicy.fixed(layer)
    except ConfigError as error:
        raise usage_error(str(error)) from error
    if len(set(tasks)) < len(tasks):
        raise usage_error("a task is named twice")
    with_exits = [name for name in STRATEGIES if name != "none"]
    if unknown := [name for name in strategies if name not in with_exits]:
        raise usage_error(
            f"--strategies is {unknown[0]!r}; give some of {', '.join(with_exits)} (backbone and "
            "full quantisation are among the arms anyway)"
        )
    if len(set(strategies)) < len(strategies):
        raise usage_error("a strategy is named twice")
    of_text = [name for name in tasks if name in TEXT_TASKS]
    if of_text:
        raise usage_error(f"{of_text[0]} is no task with answers; --text FILE measures it")
    if not tasks and text is None:
        raise usage_error("there is nothing to compare on; give --tasks or --text")
    if not thresholds:
        raise usage_error("give one threshold or more")
    if text is not None:
        try:
            read_text(text)
        except DataError as error:
            raise usage_error(str(error)) from error
    if not has_matplotlib():
        raise usage_error("the figures need matplotlib: pip install 'river-llm[plot]'")


def _show(summary: dict[str, Any], output: Path) -> None:
    from river_llm.cli.render import stdout

    for finding in summary["findings"]:
        stdout.print(f"- {finding}")
    stdout.print(f"{output / 'report.html'}, report.md, report.json, figures/")
