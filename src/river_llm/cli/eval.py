"""`river-llm eval`: tasks, perplexity and KL divergence, resumable and comparable."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.loading import LoadOptions, load
from river_llm.cli.settings import check_strategy, exit_policy, river_config
from river_llm.cli.streams import print_json
from river_llm.cli.usage import refuse_idle, usage_error
from river_llm.errors import ConfigError, DataError
from river_llm.utf8 import read_text

if TYPE_CHECKING:
    from river_llm.evaluation.requests import TaskSettings
    from river_llm.evaluation.result_file import Result
    from river_llm.evaluation.run import Run
    from river_llm.exit_policy import ExitPolicy
    from river_llm.lm import RiverLM

_TASKS, _RESULTS = options.TASKS, "Results"
_BACKBONE = "backbone"


def evaluate(
    context: typer.Context,
    tasks: Annotated[
        list[str],
        typer.Argument(
            metavar="TASK...",
            help="gsm8k, math500, humaneval, ifeval; hellaswag, arc_easy, arc_challenge, piqa, "
            "boolq, openbookqa, winogrande, mmlu, blimp; perplexity, kld.",
        ),
    ],
    model: options.Model = "smollm2",
    river: options.RiverPath = None,
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    policy: options.Policy = None,
    threshold: options.Threshold = None,
    exit_layer: options.ExitLayer = None,
    first_layer: options.FirstLayer = 1,
    prefill: options.Prefill = None,
    strategy: options.Strategy = options.StrategyName.river,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Items (windows of a text) at most; of each subject or phenomenon in turn.",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    shots: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Solved examples in the prompt. \\[default: gsm8k 8 as text and 0 as chat, "
            "mmlu 5, others 0]",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option(
            "--chat/--no-chat",
            help="Ask through the chat template. \\[default: math500 and ifeval]",
            rich_help_panel=_TASKS,
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "-n", min=1, help="Of an answer.", rich_help_panel=_TASKS),
    ] = None,
    batch_size: options.BatchSize = 8,
    text: Annotated[
        Path | None,
        typer.Option(help="The text of perplexity and kld.", rich_help_panel=_TASKS),
    ] = None,
    window: Annotated[
        int,
        typer.Option(
            help="Tokens of a window of that text; the second half of each counts.",
            rich_help_panel=_TASKS,
        ),
    ] = 512,
    data_dir: options.DataDir = None,
    allow_code_execution: options.AllowCodeExecution = False,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the result files, one for each task and arm.",
            rich_help_panel=_RESULTS,
        ),
    ] = Path("eval-results"),
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Begin anew where a result file is there; without it the run goes on.",
            rich_help_panel=_RESULTS,
        ),
    ] = False,
    compare_backbone: Annotated[
        bool,
        typer.Option(
            "--compare-backbone",
            help="Run the backbone alone on the same items first, and compare with it; nothing "
            "more where the run is the backbone: --policy never, --strategy none.",
            rich_help_panel=_RESULTS,
        ),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with this result file.", rich_help_panel=_RESULTS),
    ] = None,
    json_output: options.Json = False,
    engine: options.Engine = options.EngineName.auto,
    backbone_bits: options.BackboneBits = options.WeightBits.sixteen,
    lm_head_bits: options.HeadBits = options.WeightBits.sixteen,
    kv_bits: options.KvBits = options.WeightBits.sixteen,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    device: options.Device = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Measure a model with its river on tasks or on a text. A run that was cut short goes on with
    the same command."""
    chosen = exit_policy(policy, threshold, exit_layer, first_layer, prefill)
    built = river_config(river, bits, group_size, quantizer)
    of_policy = (policy, threshold, exit_layer, prefill, None if first_layer == 1 else first_layer)
    loading = LoadOptions(
        model=model,
        river=built,
        policy=chosen,
        dtype=dtype,
        device=device,
        threads=threads,
        trust_remote_code=trust_remote_code,
        engine=engine,
        backbone_bits=backbone_bits,
        lm_head_bits=lm_head_bits,
        kv_bits=kv_bits,
        strategy=strategy,
    )
    check_strategy(loading, options.ModeName.river, of_policy)
    if compare_backbone and strategy is options.StrategyName.quantised:
        raise usage_error(
            "--strategy quantised runs no backbone to compare with; take --policy always"
        )
    _check_tasks(context, tasks, text, compare_backbone, against)
    from river_llm.evaluation.result_file import read_whole

    other = None if against is None else read_whole(against, tasks[0])
    lm = load(loading)
    chosen = lm.policy  # of strategies without a choice, their own
    from river_llm.evaluation.harness import check_comparable, compare_results, evaluate
    from river_llm.evaluation.requests import TaskSettings
    from river_llm.exit_policy import ExitPolicy

    given = TaskSettings(
        model=model,
        limit=limit,
        shots=shots,
        chat=chat,
        max_new_tokens=max_new_tokens,
        text=text,
        window=window,
        data_dir=data_dir,
        allow_code_execution=allow_code_execution,
    )
    arms = [chosen]
    if compare_backbone and chosen != ExitPolicy.never():
        arms.insert(0, ExitPolicy.never())
    rows: list[_Row] = []
    notes: list[str] = []
    for name in tasks:
        first: Result | None = None
        for arm in arms:
            lm.policy = arm
            arm_name = _arm_name(arm, lm)
            with _progress(f"{name}, {arm.describe()}") as progress:
                run = _make_run(lm, name, given)
                if other is not None:
                    check_comparable(other, run.identity, set(run.ids))
                result = evaluate(
                    run,
                    output / f"{_file_name(name, chat)}.{arm_name}.jsonl",
                    batch_size=batch_size,
                    restart=restart,
                    settings={"engine_setting": lm.engine.setting},
                    progress=progress.steps_done,
                )
            if first is None:
                notes += run.notes
            reference = first or other
            comparable = reference is not None and "accuracy" in (result.summary or {})
            compared = compare_results(result, reference) if reference and comparable else None
            rows.append(_Row(name, arm_name, result, compared))
            first = first or (result if len(arms) > 1 else None)
    for note in notes:
        print(f"river-llm: {note}", file=sys.stderr)
    if json_output:
        print_json({"results": [row.to_dict() for row in rows]})
    else:
        _print(rows)


@dataclass(frozen=True, slots=True)
class _Row:
    task: str
    arm: str
    result: Result
    compared: dict[str, Any] | None

    @property
    def summary(self) -> dict[str, Any]:
        return dict(self.result.summary or {})

    def to_dict(self) -> dict[str, Any]:
        return {
            "task": self.task,
            "arm": self.arm,
            "file": str(self.result.path),
            "run": self.result.run,
            "parts": self.result.parts,
            "summary": self.summary,
            "comparison": self.compared,
        }


def _check_tasks(
    context: typer.Context,
    tasks: list[str],
    text: Path | None,
    compare_backbone: bool,
    against: Path | None,
) -> None:
    from river_llm.evaluation.tasks import TEXT_TASKS, check_task

    try:
        for name in tasks:
            check_task(name)
    except ConfigError as error:
        raise usage_error(str(error)) from error
    if len(set(tasks)) < len(tasks):
        raise usage_error("a task is named twice")
    of_text = [name for name in tasks if name in TEXT_TASKS]
    if of_text and text is None:
        raise usage_error(f"{of_text[0]} needs --text FILE")
    if against is not None and (compare_backbone or len(tasks) > 1 or of_text):
        raise usage_error(
            "--against goes with one task that has answers, and not with --compare-backbone"
        )
    if len(of_text) == len(tasks):
        idle = {"--shots", "--chat", "--max-new-tokens"}
        refuse_idle(context, "perplexity and kld ask nothing", idle)
    if not of_text:
        refuse_idle(context, "only perplexity and kld read a text", {"--text", "--window"})
    if text is not None:
        try:
            read_text(text)
        except DataError as error:
            raise usage_error(str(error)) from error


def _make_run(lm: RiverLM, name: str, given: TaskSettings) -> Run:
    """The run that the options name.

    Raises:
        typer.Exit: an option doesn't go with the task.
        RiverError: see the runs.
    """
    from river_llm.evaluation.requests import make_run

    try:
        return make_run(lm, name, given)
    except ConfigError as error:
        raise usage_error(str(error)) from error


def _arm_name(policy: ExitPolicy, lm: RiverLM) -> str:
    """A short name, good for a file."""
    river, strategy = lm.river_config, lm.engine.strategy
    names = {
        "never": _BACKBONE,
        "always": "exit-0" if river is None else f"full-{river.bits}bit",
        "fixed": f"exit-{policy.exit_layer}",
        "similarity": f"similarity-{policy.threshold}",
        "thresholds": "thresholds",
    }
    name = names[policy.kind]
    if policy.first_layer > 1:
        name += f"-from-{policy.first_layer}"
    usual = "river" if policy.kind == "always" and river is not None else "backbone"
    if policy.prefill != usual:
        name += f"-prefill-{policy.prefill}"
    return name if strategy == "river" else f"{strategy}-{name}"


def _file_name(task: str, chat: bool | None) -> str:
    return task if chat is None else f"{task}-{'chat' if chat else 'text'}"


def _progress(description: str) -> Any:
    from river_llm.cli.progress import LoadingProgress

    return LoadingProgress(description)


def _print(rows: list[_Row]) -> None:
    from rich.table import Table

    from river_llm.cli import render
    from river_llm.evaluation.text_run import divergence_block

    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("task", no_wrap=True)
    table.add_column("arm", overflow="fold")
    for heading in ("items", "accuracy %", "agree %", "p", "depth", "tokens/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "accuracy" in row.summary:
            table.add_row(*_accuracy_cells(row))
        elif "mean_kld" in row.summary:
            title = f"{row.arm}: {row.summary['predicted_tokens']} predicted tokens"
            render.stdout.print(title, highlight=False)
            render.stdout.print(divergence_block(row.summary), highlight=False)
        else:
            found = row.summary
            render.stdout.print(
                f"{row.arm}: perplexity {found['perplexity']:.4f} "
                f"{_spread(found['perplexity_error'], 4)}, {found['predicted_tokens']} tokens, "
                f"mean exit depth {_depth(found)}",
                highlight=False,
            )
    if table.row_count:
        render.stdout.print(table)
    for row in rows:
        render.stderr.print(f"{row.result.path}", highlight=False)


def _accuracy_cells(row: _Row) -> list[str]:
    found, compared = row.summary, row.compared
    error = found["standard_error"]
    spread = _spread(None if error is None else 100 * error, 1)
    agreement, p = "", ""
    if compared is not None:
        agreement = f"{100 * compared['agreement']:.1f}"
        p = f"{compared['mcnemar_p']:.3g}"
    speed = found["tokens_per_second"]
    return [
        row.task,
        row.arm,
        str(found["items"]),
        f"{100 * found['accuracy']:.1f} {spread}",
        agreement,
        p,
        _depth(found),
        "" if speed is None else f"{speed:.0f}",
    ]


def _depth(found: dict[str, Any]) -> str:
    depth = found["mean_exit_layer"]
    return "" if depth is None else f"{depth:.1f}/{found['num_layers']}"


def _spread(error: float | None, digits: int) -> str:
    return "" if error is None else f"± {error:.{digits}f}"
