"""`river-llm cache`: what is kept on disk for quicker starts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from river_llm.cli import options
from river_llm.cli.streams import print_json
from river_llm.errors import RiverError
from river_llm.sizes import format_bytes

if TYPE_CHECKING:
    from river_llm.store import CachedFolder

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?(?<!\.gguf)")


def cache(
    model: Annotated[
        str | None, typer.Argument(help="Only what is kept of this model.", show_default=False)
    ] = None,
    clear: Annotated[bool, typer.Option("--clear", help="Delete what is shown.")] = False,
    json_output: options.Json = False,
) -> None:
    """Show what is kept on disk for quicker starts: GGUF files converted, weights packed for the
    native engine. All of it may be deleted; it is made again from the models' own files."""
    from river_llm.cli.render import stderr, stdout
    from river_llm.store import cache_directory, cached_folders, clear_cache

    directory = cache_directory()
    folders = cached_folders() if model is None else _of_model(model, cached_folders())
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


def _of_model(name: str, folders: list[CachedFolder]) -> list[CachedFolder]:
    """Those of one model, by its name, or by its place as the list has it. Of a Hub id, those of
    every snapshot, there still or not; the Hub isn't asked.

    Raises:
        RiverError: there is no such file or directory, or no model in it.
    """
    place = Path(name)
    if any(folder.source == place for folder in folders):  # it may be gone
        return [folder for folder in folders if folder.source == place]
    from river_llm.config import DEFAULT_MODEL
    from river_llm.load.source import model_files

    if name != DEFAULT_MODEL and _HUB_ID.fullmatch(name) and not place.exists():
        directory = f"models--{name.replace('/', '--')}"  # in the Hub's own cache
        return [folder for folder in folders if directory in folder.source.parts]
    found = model_files(name)
    source = None if found is None else found[0].resolve()
    return [folder for folder in folders if folder.source == source]
