"""`river-llm cache`: what is kept on disk for quicker starts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from river_llm.cli import options
from river_llm.cli.streams import print_json
from river_llm.config import DEFAULT_MODEL
from river_llm.errors import RiverError
from river_llm.sizes import format_bytes


def cache(
    model: Annotated[
        str | None,
        typer.Argument(
            help="Only what is kept of this model: its path, the path's last name, or its Hub id.",
            show_default=False,
        ),
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete what is shown.")] = False,
    json_output: options.Json = False,
) -> None:
    """Show what is kept on disk for quicker starts: GGUF files converted, weights packed for the
    native engine. All of it may be deleted; it is made again from the models' own files."""
    from river_llm.cli.render import stderr, stdout
    from river_llm.store import cache_directory, cached_folders, clear_cache

    directory = cache_directory()
    folders = [one for one in cached_folders() if model is None or _is_of(one.source, model)]
    sizes = [folder.num_bytes for folder in folders]
    if clear:
        if model is None:
            clear_cache()
        else:
            for folder in folders:
                folder.remove()
        left = [folder for folder in folders if folder.directory.exists()]
        if left:
            raise RiverError(f"can't delete {left[0].directory}; see who may write there")
    if json_output:
        described = [
            {
                "directory": str(folder.directory),
                "kind": folder.kind,
                "source": str(folder.source),
                "form": folder.form,
                "river": folder.river and str(folder.river),
                "bytes": size,
            }
            for folder, size in zip(folders, sizes, strict=True)
        ]
        print_json({"directory": directory and str(directory), "folders": described})
        return
    if directory is None:
        stderr.print("nothing is kept: RIVER_LLM_CACHE is off, or there is no home directory")
        return
    for folder, size in zip(folders, sizes, strict=True):
        river = "" if folder.river is None else f"  river {folder.river}"
        stdout.print(f"{format_bytes(size):>10}  {folder.form}  {folder.source}{river}")
    verb = "deleted from" if clear else "in"
    stderr.print(f"{len(folders)} copies, {format_bytes(sum(sizes))}, {verb} {directory}")


def _is_of(source: Path, name: str) -> bool:
    """Whether a model's file or folder, there still or not, has this whole path or name; a folder
    is also that of the GGUF files in it, and the Hub's cache has folders models--org--name."""
    if name == DEFAULT_MODEL:
        from river_llm.load.source import smollm2_path

        name = str(smollm2_path())
    path = Path(name).expanduser().resolve()
    is_there = path in (source, source.parent)
    if is_there or path.exists():
        return is_there
    return name == source.name or f"models--{name.replace('/', '--')}" in source.parts
