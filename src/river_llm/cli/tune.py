"""`river-llm tune`: the fastest setting whose loss keeps to a budget."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.check_exact import read_prompts
from river_llm.cli.imports import import_libraries
from river_llm.cli.loading import describe_loaded, load
from river_llm.cli.settings_options import with_settings
from river_llm.cli.streams import print_json
from river_llm.cli.usage import check_plot, read_given, usage_error
from river_llm.config import DEFAULT_MODEL, EngineConfig, PromptConfig, TuneConfig
from river_llm.errors import ConfigError

if TYPE_CHECKING:
    from river_llm.lm import RiverLM
    from river_llm.measure.tune import Tuning
    from river_llm.measure.tune_data import TuneData


@partial(with_settings, without=("offload", "no_miss"))
def tune(
    river: Annotated[
        list[Path],
        typer.Option(
            help="A folder made by `river-llm build`; several may be given: the best wins."
        ),
    ],
    budget: Annotated[
        str,
        typer.Option(
            help="kld=0.05: mean divergence from the backbone at most, nats a token; "
            "agreement=0.95: share of the backbone's tokens at least; speed=2.0: times the "
            "backbone's speed at least, for the least divergence."
        ),
    ],
    config: TuneConfig,
    form: PromptConfig,
    engine: EngineConfig,
    model: options.ModelArgument = DEFAULT_MODEL,
    text: Annotated[
        Path | None,
        typer.Option(help="Measure the loss on this text; by default the model writes some."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Measure it on the answers to these prompts that each setting writes itself; a "
            "file as check-exact takes it."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw loss against speed, as PNG, SVG or PDF. \\[extra: plot]"),
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Find the fastest setting whose loss keeps to a budget, certify it on texts or prompts, and
    save it with its river, where --policy tuned takes it."""
    if text is not None and prompts is not None:
        raise usage_error("give --text or --prompts, not both")
    if prompts is None and form != PromptConfig():
        raise usage_error("--raw and the chat template's options go with --prompts")
    check_plot(plot)
    import_libraries()
    from river_llm.cli.progress import LoadingProgress
    from river_llm.measure.tune import sequences_to_certify
    from river_llm.measure.tune import tune as tune_model
    from river_llm.measure.tune_data import WRITTEN, check_count
    from river_llm.river.tuned import WIDTHS, QualityBudget, Tuned

    try:
        asked = QualityBudget.parse(budget)
    except ConfigError as error:
        raise usage_error(str(error)) from error
    given = None if text is None else read_given(text)
    questions = None if prompts is None else read_prompts(prompts)[: config.sequences]
    source = text or prompts
    count = config.sequences if questions is None else len(questions)
    name = WRITTEN if source is None else source.name
    check_count(name, count, config.tokens, sequences_to_certify(asked, config))
    for one in river:
        Tuned.check_place(one)
    lms = {str(one): load(model, one, _never(), engine)[0] for one in dict.fromkeys(river)}
    (first, backbone), *_ = lms.items()
    with LoadingProgress(f"tuning {model}") as progress:
        data = _data(backbone, config, form, text, given, prompts, questions, progress.phase_done)
        widths = {name: getattr(engine, name) for name in WIDTHS}
        found = tune_model(lms, data, asked, config, widths, progress.phase_done)
    if json_output:
        described = describe_loaded(model, Path(first), engine, backbone)
        del described["river"], described["river_directory"]
        print_json({**described, **_describe(found)})
    else:
        _print(found)
    folder = Path(found.chosen.setting.river)
    found.tuned.save(folder)
    if not json_output:
        from river_llm.cli.render import stdout

        stdout.print(f"it is saved with the river: --river {folder} --policy tuned")
    if plot is not None:
        from river_llm.measure.plots import plot_tuning

        plot_tuning(found, asked, shlex.join(["river-llm", *sys.argv[1:]]), plot)


def _never() -> Any:
    from river_llm.river.policy import ExitPolicy

    return ExitPolicy.never()


def _data(
    lm: RiverLM,
    config: TuneConfig,
    form: PromptConfig,
    text: Path | None,
    given: str | None,
    prompts: Path | None,
    questions: Any,
    progress: Any,
) -> TuneData:
    from river_llm.generate.generator import check_prompt
    from river_llm.measure.tune_data import Prompts, given_texts, written_texts

    count, length = config.sequences, config.tokens
    if questions is not None:
        assert prompts is not None
        encoded = [lm.encode(question, form) for question in questions]
        for number, tokens in enumerate(encoded, 1):
            whose = f"prompt {number} of {len(encoded)}: "
            check_prompt(len(tokens), lm.engine.context_length, whose)
        return Prompts(f"answers to {prompts.name}", encoded, length)
    if given is not None:
        assert text is not None
        return given_texts(lm.tokenizer, text.name, given, count, length)
    return written_texts(lm, count, length, config.seed, progress)


def _describe(found: Tuning) -> dict[str, Any]:
    return {
        "slower_settings": found.slower,
        "settings": [one.to_dict() for one in found.measured],
        "chosen": {"river": found.chosen.setting.river, **found.tuned.to_dict()},
        "held_out_sequences": found.held_out,
    }


def _print(found: Tuning) -> None:
    """The table of what was measured, and what was chosen."""
    from river_llm.cli.render import print_whole, stdout, tuning_table
    from river_llm.measure.certificate import CUT

    print_whole(tuning_table(found))
    if found.slower:
        stdout.print(f"left out: {found.slower} settings no faster than lossless, or than asked")
    tuned, river = found.tuned, found.chosen.setting.river
    stdout.print(f"{river}: {tuned.describe()}")
    if tuned.cut_sequences:
        stdout.print(
            f"{tuned.cut_sequences} of {tuned.sequences} sequences lost more than {CUT:g} times "
            "the budget, and count as that much"
        )
