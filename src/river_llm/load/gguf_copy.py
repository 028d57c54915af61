"""GGUF files as `save_pretrained` writes a model, each parsed once and not at every load.

To dequantise a file takes seconds for each 100M parameters, to map its copy a fraction of one.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from river_llm.load.source import gguf_files
from river_llm.store import CachedFolder, file_state

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Goes up with every change of what a file is read as.
FORMAT_VERSION = 4


def copy_of(file: Path, dtype: torch.dtype) -> CachedFolder | None:
    """The folder for a GGUF file as it is now; None where the cache is off.

    Raises:
        OSError: the file can't be read.
    """
    import transformers

    origin = {
        "format_version": FORMAT_VERSION,
        "transformers": transformers.__version__,
        "files": {path.name: file_state(path) for path in gguf_files(file)},
    }
    return CachedFolder.of("converted", file, str(dtype).removeprefix("torch."), origin)


def read_copy(folder: CachedFolder) -> tuple[PreTrainedModel, PreTrainedTokenizerBase] | None:
    """Model, its weights mapped from the file, and tokenizer; None where there is no copy, or a
    damaged one, which is removed."""
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = folder.read(
        partial(_read, dtype=folder.form)
    )
    if loaded is not None:
        model, tokenizer = loaded  # as if it had been parsed
        model.config._name_or_path = model.name_or_path = str(folder.source.parent)
        tokenizer.name_or_path = model.name_or_path
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

    # of no other class: none is made by the model's type
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory)
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=getattr(torch, dtype), use_safetensors=True, output_loading_info=True
    )
    if info["missing_keys"]:
        raise ValueError(f"{directory} lacks {min(info['missing_keys'])}")
    return model, tokenizer
