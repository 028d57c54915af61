"""`river-llm build`: make a model's exit river and keep it."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from river_llm.cli import options
from river_llm.cli.loading import check_device, prepare_torch, torch_dtype
from river_llm.cli.settings import new_river_config
from river_llm.sizes import format_bytes


def build(
    model: options.ModelArgument,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The folder to write the river to.")
    ],
    bits: options.Bits = 4,
    group_size: options.GroupSize = 64,
    quantizer: options.Quantizer = options.QuantizerName.hqq,
    dtype: options.Dtype = options.DtypeName.bfloat16,
    device: options.Device = None,
    threads: options.Threads = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Build a model's exit river and write it to a folder."""
    from river_llm.cli.progress import LoadingProgress
    from river_llm.cli.render import stderr

    config = new_river_config(bits, group_size, quantizer)
    with LoadingProgress(f"loading {model}") as progress:
        prepare_torch(threads)
        from river_llm.load.model import load_backbone
        from river_llm.river import River

        River.check_place(output)
        backbone, _ = load_backbone(
            model,
            torch_dtype(dtype),
            check_device(device) or "cpu",
            trust_remote_code,
        )
        start = time.perf_counter()
        river = River.build(backbone, config, progress.layers_built)
        seconds = time.perf_counter() - start
        river.save(output)
    stderr.print(
        f"{len(river.exit_layers)} exit layers, {config.bits} bits in groups of "
        f"{config.group_size} ({config.quantizer}), {format_bytes(river.num_bytes)}, "
        f"built in {seconds:.1f} s: {output}"
    )
