"""`river-llm build`: make a model's exit river and keep it."""

from __future__ import annotations

import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated

import typer

from river_llm.cli import options
from river_llm.cli.loading import prepare_torch
from river_llm.cli.settings_options import with_settings
from river_llm.cli.usage import read_given, usage_error
from river_llm.config import EngineConfig, RiverConfig
from river_llm.sizes import format_bytes

_RIVER = RiverConfig(quantizer="gptq")


@with_settings
def build(
    model: options.ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write the river to.")
    ],
    engine: EngineConfig,
    context: typer.Context,
    config: RiverConfig = _RIVER,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Text for gptq and for bits auto; by default the model writes one.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="CHECKPOINT",
            help="A checkpoint of the same model in few bits (GPTQ, AWQ, compressed-tensors, GGUF) "
            "that becomes the river.",
        ),
    ] = None,
) -> None:
    """Build a model's exit river and write it to a folder."""
    from river_llm.cli.progress import LoadingProgress
    from river_llm.cli.render import stderr

    if source is not None:
        _check_stands_alone(context)
    elif config.quantizer == "imported":
        raise usage_error("--quantizer imported is what --from CHECKPOINT makes; give that")
    if calibrate is not None and not config.needs_text:
        raise usage_error("--calibrate goes with --quantizer gptq, or --bits auto")
    given = None if calibrate is None else read_given(calibrate)
    with LoadingProgress(f"loading {model}") as progress:
        prepare_torch(engine)
        from river_llm.load.calibration_text import given_text, written_text
        from river_llm.load.model import load_backbone
        from river_llm.load.quantized import check_checkpoint, import_river
        from river_llm.river.river import River

        River.check_place(output)
        if source is not None:
            check_checkpoint(source)
        backbone, tokenizer = load_backbone(
            model, engine.torch_dtype, engine.device or "cpu", engine.trust_remote_code
        )
        start = time.perf_counter()
        note = ""
        if source is not None:
            imported = import_river(backbone, source, progress.layers_built)
            river, note = imported.river, f"; {imported.describe()}"
        else:
            text = None
            if given is not None:
                text = given_text(given, backbone, tokenizer)
            elif config.needs_text:
                text = written_text(backbone, tokenizer, progress.text_written)
            river = River.build(backbone, config, progress.layers_built, text)
            if config.needs_text:
                origin = "the model's own text" if calibrate is None else calibrate.name
                river = replace(river, source=f"{config.quantizer}: {origin}")
        seconds = time.perf_counter() - start
        river.save(output)
    config = river.config
    stderr.print(
        f"{len(river.exit_layers)} exit layers, {config.describe_bits(river.average_bits)} in "
        f"groups of {config.group_size} ({river.source or config.quantizer}), "
        f"{format_bytes(river.num_bytes)}, built in {seconds:.1f} s: {output}{note}"
    )


def _check_stands_alone(context: typer.Context) -> None:
    """Refuse options of quantisers beside a checkpoint, which decides all of it."""
    for name in (*(one.name for one in fields(RiverConfig)), "calibrate"):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise usage_error(f"--{name.replace('_', '-')} doesn't go with --from")
