"""The converted copies of GGUF files, so that each is parsed once and not at every load.

To dequantise a file takes seconds for each 100M parameters, to map its copy a fraction of one: it
is what `save_pretrained` writes of model and tokenizer.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from river_llm.load.source import COMPANIONS, gguf_parts
from river_llm.store import CachedFolder, file_state, folder_for

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Goes up with every change of what a file is read as.
FORMAT_VERSION = 3


def copy_of(file: Path, dtype: torch.dtype) -> CachedFolder | None:
    """The copy that belongs to a GGUF file as it is now, by the file, what lies beside it, the
    dtype and the version of transformers; None where the cache is off.

    Raises:
        OSError: the file can't be read.
    """
    import transformers

    name = str(dtype).removeprefix("torch.")
    companions = [path for path in map(file.with_name, COMPANIONS) if path.is_file()]
    origin = {
        "format_version": FORMAT_VERSION,
        "transformers": transformers.__version__,
        "dtype": name,
        "files": {path.name: file_state(path) for path in [*gguf_parts(file), *companions]},
    }
    return folder_for("converted", file.stem, file, name, origin)


def read_copy(folder: CachedFolder) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Model, its weights mapped from the file, and tokenizer; None where there is no copy, or a
    damaged one, which is removed."""
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = folder.read(
        partial(_read, dtype=folder.form)
    )
    if loaded is not None:
        name = str(folder.source.parent)  # as if it had been parsed
        model, tokenizer = loaded
        model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = name
    return loaded


def keep_copy(
    folder: CachedFolder, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Write the copy; where that can't be done, there is none."""

    def fill(directory: Path) -> None:
        config = model.config
        try:
            model.config = copy.deepcopy(config)  # save_pretrained changes it
            model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
        finally:
            model.config = config

    folder.keep(sum(weight.nbytes for weight in model.parameters()), fill)


def _read(directory: Path, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(
        directory
    )  # none is made by the model's type
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{directory} lacks {sorted(info['missing_keys'])[0]}")
    return model, tokenizer
