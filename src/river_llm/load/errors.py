"""Whatever the loaders raise, as one line with the cause and what to do."""

from __future__ import annotations

import json
import re
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
_NO_TOKENIZER = (
    "{name} holds no tokenizer; copy the model's tokenizer.json and its companions to it"
)
# What is in the loaders' words, and what it comes to: {name} of the model, {reason} they give.
_CAUSES = {
    "trust_remote_code": "{name} comes with code of its own; read it, and if you trust it, "
    "allow it with --trust-remote-code",
    "not supported yet|does not recognize this architecture": "{name} has an architecture that "
    "transformers doesn't know ({reason}); upgrade transformers or take another model",
    "Unrecognized configuration class": "{name} is no causal language model ({reason}); "
    "take a decoder-only model",
    "ignore_mismatched_sizes": "the weights of {name} have other shapes than its config.json "
    "says; get config and weights from one place",
    "Should have a `model_type` key": "the config.json of {name} names no architecture; "
    "get the model's own config.json",
    "rope_parameters|alidation error for": "the config.json of {name} isn't valid ({reason}); "
    "correct it",
    "^KeyError: 'metadata'$": "the model.safetensors.index.json of {name} has no metadata; "
    "download the model (hf download {name}) and give its folder, where that is no matter",
    "^KeyError": "{name} can't be loaded: its config.json may name what transformers doesn't "
    "know ({reason}); upgrade it, or correct config.json",
    "Couldn't instantiate the backend tokenizer": "the tokenizer of {name} can't be read: its "
    "file is damaged, or of a kind that needs another package (pip install sentencepiece tiktoken)",
    "safetensors.*no file named|no file named.*safetensors": "{name} has no safetensors weights; "
    "convert pickled weights to safetensors first",
    "(?i)^safetensor|deserializing": "the weights of {name} can't be read, a file may be cut "
    "short ({reason}); get them again",
}


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
        ModelLoadError: there are none.
    """
    if not _holds(directory, _TOKENIZER_PREFIXES):
        raise ModelLoadError(_NO_TOKENIZER.format(name=directory))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or another device."""
    is_its_own = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_its_own or bool(re.search("DefaultCPUAllocator|Cannot allocate memory", str(error)))


def _holds(directory: Path, prefixes: tuple[str, ...]) -> bool:
    return any(
        path.name.startswith(prefixes) or path.suffix in _TOKENIZER_SUFFIXES
        for path in directory.iterdir()
    )


def _explain(error: BaseException, name: str, gguf_file: str | None) -> str:
    text = " ".join(str(error).split())
    reason = brief(text) or type(error).__name__
    directory = Path(name).expanduser()
    if is_out_of_memory(error):
        return f"not enough memory to load {name}; close other programs or take a smaller model"
    if isinstance(error, ImportError):
        return f"{name} needs a package that is not installed ({reason})"
    words = f"{type(error).__name__}: {text}"
    cause = next((cause for cause in _CAUSES if re.search(cause, words)), None)
    if directory.is_dir() and cause is not None:
        if "tokenizer" in cause and not _holds(directory, _VOCABULARY_PREFIXES):
            return _NO_TOKENIZER.format(name=name)
        if "no file" in cause and not any(p.suffix in _PICKLED for p in directory.iterdir()):
            return f"{name} holds no weights; get its model.safetensors too, or all parts of it"
    if isinstance(error, json.JSONDecodeError | UnicodeDecodeError) and gguf_file is None:
        # the other files were read before
        return f"the tokenizer of {name} can't be read ({reason}); get its files again"
    if cause is not None:
        return _CAUSES[cause].format(name=name, reason=reason)
    if gguf_file is not None:
        return f"{name} can't be read as GGUF, it may be cut short ({reason}); get it again"
    return f"{name} can't be loaded ({reason}); check that its files are whole"
