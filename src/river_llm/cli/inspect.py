"""`river-llm inspect`: a model's layers, what its river costs, what it does on a text."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from river_llm.cli import options
from river_llm.cli.loading import load_attached, saved_or_new
from river_llm.cli.settings_options import with_settings
from river_llm.cli.streams import print_json, read_stdin
from river_llm.cli.usage import check_plot, check_text, read_given, usage_error
from river_llm.config import (
    DEFAULT_MODEL,
    DEFAULT_THRESHOLD,
    EngineConfig,
    PolicyConfig,
    RiverConfig,
)
from river_llm.sizes import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from river_llm.measure.inspection import TextInspection
    from river_llm.river.attach import AttachedRiver


# nothing is evicted here, and nothing runs twice
@partial(with_settings, without=("offload", "no_miss", "second_look"))
def inspect(
    policy: PolicyConfig,
    config: RiverConfig,
    engine: EngineConfig,
    model: options.ModelArgument = DEFAULT_MODEL,
    river: options.RiverPath = None,
    text: Annotated[
        str | None, typer.Option(help="Measure the river on this text; - reads it from stdin.")
    ] = None,
    text_file: Annotated[
        Path | None, typer.Option(help="Measure the river on the text of this file.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Read at most so much of it.")] = 512,
    plot: Annotated[
        Path | None, typer.Option(help="Draw it too, as PNG, SVG or PDF. \\[extra: plot]")
    ] = None,
    json_output: options.Json = False,
) -> None:
    """Show a model's layers, what its river costs in bytes, and what both do on a text."""
    from river_llm.cli.progress import LoadingProgress
    from river_llm.river.policy import ExitPolicy
    from river_llm.river.tuned import Tuned

    chosen = policy.exit_policy() or ExitPolicy.similarity(DEFAULT_THRESHOLD)
    tuned = None if river is None else Tuned.load(river)
    text = _read_text(text, text_file)
    if plot is not None and text is None:
        raise usage_error("--plot draws what is measured on a text; give --text")
    check_plot(plot)
    attached, tokenizer = load_attached(model, saved_or_new(river, config), chosen, engine)
    output = {"model": model, **_describe(attached)}
    if tuned is not None:
        output["tuned"] = {**tuned.to_dict(), "words": tuned.describe()}
    if text is not None:
        with LoadingProgress("reading the text"):
            inspection, pieces = _inspect(attached, tokenizer, text, max_tokens)
        output |= {
            "similarity": inspection.similarities.nanmean(1).tolist(),
            "key_cosine": inspection.key_cosine.tolist(),
            "value_cosine": inspection.value_cosine.tolist(),
            "tokens": pieces,
            "exit_layers": inspection.exit_layers.tolist(),
            "mean_exit_layer": float(inspection.exit_layers.float().mean()),
            "policy": attached.policy.to_dict(),
        }
        if plot is not None:
            from river_llm.measure.plots import plot_inspection

            command = shlex.join(["river-llm", *sys.argv[1:]])
            plot_inspection(inspection, attached.policy, command, plot)
    if json_output:
        print_json(output)
        return
    _show_model(output)
    if text is not None:
        _show_text(output)


def _read_text(text: str | None, text_file: Path | None) -> str | None:
    if text is not None and text_file is not None:
        raise usage_error("give --text or --text-file, not both")
    if text_file is not None:
        text = read_given(text_file)
    elif text == "-":
        text = read_stdin()
    if text is not None:
        check_text("the text", text)
        if not text.strip():
            raise usage_error("the text is empty")
    return text


def _describe(attached: AttachedRiver) -> dict[str, Any]:
    """The model's shape, and the bytes of backbone and river."""
    from river_llm.river.backbone import decoder_layers, linear_weight
    from river_llm.river.quantize import average_bits

    layers = decoder_layers(attached.model)
    linears = [linear_weight(linear) for layer in layers for linear in layer.linears.values()]
    backbone_bytes = sum(weight.nbytes for weight in linears)
    parameters = list(attached.model.parameters())
    return {
        "architecture": type(attached.model).__name__,
        "num_layers": attached.num_layers,
        "linears": {
            name: list(linear_weight(linear).shape) for name, linear in layers[0].linears.items()
        },
        "model_bytes": sum(parameter.nbytes for parameter in parameters),
        "backbone_linear_bytes": backbone_bytes,
        "river": attached.config.to_dict(),
        "river_bytes": attached.num_bytes,
        "average_bits": average_bits(attached.matrices),
        "bits_per_weight": 8 * attached.num_bytes / sum(weight.numel() for weight in linears),
    }


def _inspect(
    attached: AttachedRiver, tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int
) -> tuple[TextInspection, list[str]]:
    from river_llm.errors import ConfigError
    from river_llm.measure.inspection import inspect_text

    config = attached.model.config.get_text_config(decoder=True)
    context = getattr(config, "max_position_embeddings", max_tokens)
    token_ids = list(tokenizer(text).input_ids)[: min(max_tokens, context)]
    if len(token_ids) < 2:
        raise ConfigError("the text has fewer than two tokens; give a longer one")
    return inspect_text(attached, token_ids), [tokenizer.decode([t]) for t in token_ids]


def _show_model(output: dict[str, Any]) -> None:
    from river_llm.cli.render import stdout

    river = RiverConfig.of(output["river"])
    width = river.describe_bits(output["average_bits"])
    stdout.print(
        f"{output['architecture']}, {output['num_layers']} decoder layers, each with the linear "
        "layers (outputs x inputs)"
    )
    for name, (rows, columns) in output["linears"].items():
        stdout.print(f"  {name:20} {rows} x {columns}")
    ratio = output["river_bytes"] / output["backbone_linear_bytes"]
    stdout.print(
        f"model {format_bytes(output['model_bytes'])}, of that the decoder layers' linear weights "
        f"{format_bytes(output['backbone_linear_bytes'])}"
    )
    stdout.print(
        f"river {format_bytes(output['river_bytes'])}: {width} in groups of {river.group_size} "
        f"({river.quantizer}), {output['bits_per_weight']:.2f} bits a weight with scales, "
        f"{100 * ratio:.0f} % of those weights"
    )
    if "tuned" in output:
        stdout.print(f"tuned: {output['tuned']['words']}")


def _show_text(output: dict[str, Any]) -> None:
    from rich.table import Table

    from river_llm.cli.render import print_token, stdout

    num_layers, exit_layers = output["num_layers"], output["exit_layers"]
    stdout.print()
    table = Table(title=f"on {len(output['tokens'])} tokens")
    for heading in ("layer", "similarity", "key cosine", "value cosine", "tokens that leave here"):
        table.add_column(heading, justify="right")
    measures = zip(output["similarity"], output["key_cosine"], output["value_cosine"], strict=True)
    for layer, numbers in enumerate(measures, 1):
        leaving = f"{exit_layers.count(layer)}{' (stay)' * (layer == num_layers)}"
        table.add_row(str(layer), *(f"{number:.4f}" for number in numbers), leaving)
    stdout.print(table)
    for piece, exit_layer in zip(output["tokens"], exit_layers, strict=True):
        print_token(piece, exit_layer, num_layers)
    stdout.print(f"\n\nmean exit depth {output['mean_exit_layer']:.1f} of {num_layers}")
