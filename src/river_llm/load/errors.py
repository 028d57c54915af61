"""Whatever the loaders raise, as one line with the cause and what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from river_llm.errors import ModelLoadError, RiverError
from river_llm.load.source import brief

_VOCABULARY_PREFIXES = ("tokenizer.json", "vocab", "merges", "tekken", "encoder")
_TOKENIZER_PREFIXES = (*_VOCABULARY_PREFIXES, "tokenizer", "special_tokens")
_TOKENIZER_SUFFIXES = (".model", ".tiktoken", ".bpe")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")


@contextmanager
def one_clear_line(name: str, gguf_file: str | None) -> Iterator[None]:
    """Turn whatever the loaders raise into a `ModelLoadError` with the cause and the fix.

    Args:
        name: of the model, as the user gave it.
        gguf_file: the name of its GGUF file, or None.
    """
    try:
        yield
    except RiverError as error:
        line = "".join(c if c.isprintable() else "?" for c in str(error))  # names in a file
        if line != str(error):
            raise type(error)(line) from error
        raise
    except BaseException as error:
        # Rust's libraries raise what is no Exception where they meet what they don't expect
        if isinstance(error, Exception) or type(error).__name__ == "PanicException":
            raise ModelLoadError(_explain(error, name, gguf_file)) from error
        raise


def check_has_tokenizer(directory: Path) -> None:
    """Some classes of tokenizers make an empty one where there are no files.

    Raises:
        ModelLoadError: there are none. What is in the Hub is not looked at.
    """
    if directory.is_dir() and not _holds(directory, _TOKENIZER_PREFIXES):
        raise ModelLoadError(_no_tokenizer(str(directory)))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or another device."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in str(error)
        or "Cannot allocate memory" in str(error)
    )


def _holds(directory: Path, prefixes: tuple[str, ...]) -> bool:
    return any(
        path.name.startswith(prefixes) or path.suffix in _TOKENIZER_SUFFIXES
        for path in directory.iterdir()
    )


def _no_tokenizer(name: str) -> str:
    return f"{name} holds no tokenizer; copy the model's tokenizer.json and its companions to it"


def _explain(error: BaseException, name: str, gguf_file: str | None) -> str:
    text = " ".join(str(error).split())
    directory = Path(name).expanduser()
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
    if "rope_parameters" in text:
        return f"the rotary settings of {name} can't be used ({brief(text)}); correct config.json"
    if "alidation error for" in text:
        return f"the config.json of {name} isn't valid ({brief(text)}); correct it"
    if isinstance(error, KeyError) and text == "'metadata'":
        return (
            f"the model.safetensors.index.json of {name} has no metadata; download the model (hf "
            f"download {name}) and give its folder, where that is no matter"
        )
    if isinstance(error, KeyError):
        return (
            f"{name} can't be loaded: its config.json may name what transformers doesn't know "
            f"({brief(text)}); upgrade transformers, or correct it"
        )
    if "Couldn't instantiate the backend tokenizer" in text:
        if directory.is_dir() and not _holds(directory, _VOCABULARY_PREFIXES):
            return _no_tokenizer(name)
        return (
            f"the tokenizer of {name} can't be read: its file is damaged, or of a kind that needs "
            "another package (pip install sentencepiece tiktoken)"
        )
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and gguf_file is None:
        # the other files were read before
        return f"the tokenizer of {name} can't be read ({brief(text)}); get its files again"
    if "safetensors" in text and "no file named" in text:
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
    reason = brief(text) if text else type(error).__name__
    return f"{name} can't be loaded ({reason}); check that its files are whole"
