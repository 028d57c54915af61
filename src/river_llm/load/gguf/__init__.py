"""A model of `transformers` and its tokenizer from a GGUF file, or from all parts of one.

Architectures of the native engine and a few more are read here; the others by `transformers`'
reader, whose result is held against the file. In both cases every tensor becomes a weight, and
every key that may change the computation is honoured, or the file is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from river_llm.errors import ModelLoadError
from river_llm.load.gguf.architectures import ARCHITECTURES, model_settings
from river_llm.load.gguf.by_transformers import check_architecture, load_by_transformers
from river_llm.load.gguf.file import GGUFContent, read_gguf
from river_llm.load.gguf.metadata import Metadata
from river_llm.load.gguf.tokenizer import GGUFTokenizer
from river_llm.load.gguf.weights import read_weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_gguf(
    parts: Sequence[Path], dtype: torch.dtype
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read a file, or all parts of one in order, dequantised to `dtype`.

    The model's generation config ends an answer at the file's EOS, end-of-turn and end-of-message
    tokens, and at those of a generation_config.json beside it.

    Raises:
        ModelLoadError: the file is damaged, of a kind that isn't known, or has something that would
            go nowhere.
        UnsupportedModelError: it is a mixture of experts or keeps a recurrent state.
    """
    content = read_gguf(parts)
    metadata = Metadata(content.path, content.metadata)
    is_known = metadata.architecture in ARCHITECTURES
    if not is_known:
        check_architecture(metadata)
    tokenizer = GGUFTokenizer(content)
    if is_known:
        model = _load_here(content, metadata, tokenizer, dtype)
    else:
        model = load_by_transformers(content, metadata, tokenizer.known_keys, len(parts), dtype)
    tokenizer.check_fits(model.get_input_embeddings().weight.shape[0])
    _set_ends(model, tokenizer, content.path.with_name("generation_config.json"))
    built = tokenizer.build()
    name = str(content.path.parent)
    model.config._name_or_path = model.name_or_path = built.name_or_path = name
    return model, built


def _load_here(
    content: GGUFContent, metadata: Metadata, tokenizer: GGUFTokenizer, dtype: torch.dtype
) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = model_settings(metadata, content.tensors)
    metadata.check_all_taken(tokenizer.known_keys)
    config = AutoConfig.for_model(**settings, **tokenizer.token_settings())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in empty.state_dict().items()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    weights = read_weights(metadata, content.tensors, shapes, config, dtype)
    model: PreTrainedModel = type(empty).from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype
    )
    return model


def _set_ends(model: PreTrainedModel, tokenizer: GGUFTokenizer, beside: Path) -> None:
    """Note which tokens end an answer."""
    from transformers import GenerationConfig

    ends = list(tokenizer.end_ids)
    if beside.is_file():
        try:
            listed = GenerationConfig.from_pretrained(beside.parent).eos_token_id
            listed = listed if isinstance(listed, list) else [listed]
            ends += [end for end in map(tokenizer.check_id, listed) if end is not None]
        except (OSError, TypeError, ValueError) as error:
            raise ModelLoadError(f"{beside} can't be read; correct it, or take it away") from error
    if model.generation_config is None:
        model.generation_config = GenerationConfig()
    model.generation_config.bos_token_id = tokenizer.bos_id
    model.generation_config.eos_token_id = list(dict.fromkeys(ends)) or None
