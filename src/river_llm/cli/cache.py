"""`river-llm cache`: what is kept on disk for quicker starts."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from river_llm.cli import options
from river_llm.errors import RiverError


def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete it all.")] = False,
    json_output: options.Json = False,
) -> None:
    """Show what is kept on disk for quicker starts: GGUF files converted, weights packed for the
    native engine. All of it may be deleted; it is made again from the models' own files."""
    from river_llm.cache import cache_directory, cached_folders, clear_cache
    from river_llm.cli.render import format_bytes, stderr, stdout

    directory = cache_directory()
    folders = cached_folders()
    sizes = [folder.num_bytes for folder in folders]
    if clear:
        clear_cache()
        left = cached_folders()
        if left:
            raise RiverError(f"can't delete {left[0].directory}; see who may write there")
    if json_output:
        described = [
            {
                "directory": str(folder.directory),
                "kind": folder.kind,
                "source": str(folder.source),
                "form": folder.form,
                "bytes": size,
            }
            for folder, size in zip(folders, sizes, strict=True)
        ]
        print(json.dumps({"directory": directory and str(directory), "folders": described}))
        return
    if directory is None:
        stderr.print("nothing is kept: RIVER_LLM_CACHE is off, or there is no home directory")
        return
    for folder, size in zip(folders, sizes, strict=True):
        stdout.print(f"{format_bytes(size):>10}  {folder.form}  {folder.source}")
    verb = "deleted from" if clear else "in"
    stderr.print(f"{len(folders)} copies, {format_bytes(sum(sizes))}, {verb} {directory}")
