"""GGUF files as `save_pretrained` writes a model, each parsed once and not at every load.

To dequantise a file takes seconds for each 100M parameters, to map its copy a fraction of one.
"""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from river_llm.load.gguf import load_gguf
from river_llm.load.source import gguf_files, gguf_parts
from river_llm.river.backbone import check_kind
from river_llm.store import CachedFolder, file_state

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Goes up with every change of what a file is read as.
FORMAT_VERSION = 4


def load_gguf_or_copy(
    file: Path, dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a GGUF file, or, their weights mapped, from the copy of it; where
    that can't be written, there is none.

    Raises:
        OSError: the file can't be read.
        ModelLoadError, UnsupportedModelError: see `load_gguf`.
    """
    import transformers

    form = str(dtype).removeprefix("torch.")
    origin = {
        "format_version": FORMAT_VERSION,
        "transformers": transformers.__version__,
        "files": {path.name: file_state(path) for path in gguf_files(file)},
    }
    folder = CachedFolder.of("converted", file, form, origin)
    copied = folder and folder.read(partial(_read, dtype=form))
    if copied:
        model, tokenizer = copied
        model.config._name_or_path = model.name_or_path = str(file.resolve().parent)
        tokenizer.name_or_path = model.name_or_path  # as if it had been parsed
        return model, tokenizer
    model, tokenizer = load_gguf(gguf_parts(file), dtype)
    check_kind(model.config, type(model))
    if folder:
        num_bytes = sum(weight.nbytes for weight in model.parameters())
        folder.keep(num_bytes, partial(_write, model=model, tokenizer=tokenizer))
    return model, tokenizer


def _write(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    config = model.config
    try:
        model.config = copy.deepcopy(config)  # save_pretrained changes it
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    finally:
        model.config = config


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
