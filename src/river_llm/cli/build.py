"""`river-llm build`: make a model's exit river and keep it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from river_llm.cli import options
from river_llm.cli.loading import prepare_torch
from river_llm.cli.settings_options import with_settings
from river_llm.cli.usage import usage_error
from river_llm.config import EngineConfig, RiverConfig
from river_llm.sizes import format_bytes
from river_llm.text.utf8 import read_text

_RIVER = RiverConfig(quantizer="gptq")


@with_settings
def build(
    model: options.ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write the river to.")
    ],
    engine: EngineConfig,
    config: RiverConfig = _RIVER,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            help="Text for gptq and for bits auto; by default the model writes one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Build a model's exit river and write it to a folder."""
    from river_llm.cli.progress import LoadingProgress
    from river_llm.cli.render import stderr

    needs_text = config.quantizer == "gptq" or config.bits == "auto"
    if calibrate is not None and not needs_text:
        raise usage_error("--calibrate goes with --quantizer gptq, or --bits auto")
    given = None if calibrate is None else read_text(calibrate)
    with LoadingProgress(f"loading {model}") as progress:
        prepare_torch(engine)
        from river_llm.load.calibration_text import given_text, written_text
        from river_llm.load.model import load_backbone
        from river_llm.river.river import River

        River.check_place(output)
        backbone, tokenizer = load_backbone(
            model, engine.torch_dtype, engine.device or "cpu", engine.trust_remote_code
        )
        start = time.perf_counter()
        text = None
        if given is not None:
            text = given_text(given, backbone, tokenizer)
        elif needs_text:
            text = written_text(backbone, tokenizer, progress.text_written)
        river = River.build(backbone, config, progress.layers_built, text)
        seconds = time.perf_counter() - start
        river.save(output)
    stderr.print(
        f"{len(river.exit_layers)} exit layers, {config.describe_bits(river.average_bits)} in "
        f"groups of {config.group_size} ({config.quantizer}), {format_bytes(river.num_bytes)}, "
        f"built in {seconds:.1f} s: {output}"
    )
