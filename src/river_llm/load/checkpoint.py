"""What a model directory tells of itself before anything is loaded: config.json, the files beside
it, and the headers of its safetensors files. Reads no weights and asks for no package."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open

from river_llm.errors import DataError, ModelLoadError
from river_llm.load.source import ADAPTER_CONFIG, check_is_no_pointer
from river_llm.text.utf8 import read_text

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Of a repository: what decides whether it can be loaded at all.
_OLD_TEMPLATE = "chat_template.json"  # of processors
DESCRIPTIONS = (
    *(CONFIG, ADAPTER_CONFIG, INDEX, _OLD_TEMPLATE),
    *("hf_quant_config.json", "quantize_config.json"),
)
# transformers goes on without one of these, and without a word, where it is damaged.
_SETTINGS = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    _OLD_TEMPLATE,
)
_JSON = (CONFIG, INDEX, *_SETTINGS, "tokenizer.json", "added_tokens.json", "vocab.json")
_QUANTISATION_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_OF_RIVERS = ("gptq", "compressed-tensors")  # methods that `quantized` reads
_METHODS_OF_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_QUANTISATION_KEYS = ("quantization_config", "quantization", "compression_config")
_METHOD_KEYS = ("quant_method", "quant_algo", "quantization_method", "quant_type", "method")
_BITS_KEYS = ("bits", "w_bit", "num_bits", "nbits", "wbits")
_ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapters.safetensors")
_PARTIAL = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")
# Where the text part of a model that takes images too stands among its weights, in checkpoints of
# various ages.
TEXT_PART_NAMES = {r"^model\.language_model\.": "model.", r"^language_model\.": ""}
ATTENTIONS = ("eager", "sdpa")  # of PyTorch alone
_ATTENTION_KEYS = ("attn_implementation", "_attn_implementation")
_FLOATS = ("F64", "F32", "F16", "BF16")
# Tensors that only quantised checkpoints have, by the ends of their names.
_QUANTISED = re.compile(
    r"(^|\.)(qweight|qzeros|g_idx|scales|SCB|W_q|(nested_)?(absmax|quant_map)|quant_state\..*"
    r"|(weight|input|activation)_(scales?|scale_inv|scale_2|packed|zero_point))$"
)
_ADAPTER = re.compile(r"^base_model\.model\.|\.base_layer\.|(^|[._])lora_(A|B|embedding)")
_log = logging.getLogger(__name__)

_MERGE = (
    "merge it into its model with PEFT (merge_and_unload, then save_pretrained), and take the "
    "folder that this writes"
)


def check_description(directory: Path, name: str) -> None:
    """Validate what a directory says of its model, weights not yet there or not.

    Args:
        name: of the model, as the user gave it.

    Raises:
        ModelLoadError: it is an adapter, it is quantised already, a file is a Git LFS pointer, no
            JSON or no UTF-8, or its tokenizer needs a package that is not installed.
    """
    templates = directory.glob("additional_chat_templates/*.jinja")
    texts = [directory / "chat_template.jinja", *templates]
    models = []
    if not (directory / "tokenizer.json").is_file():
        texts += [directory / "merges.txt", directory / "vocab.txt"]
        models = _vocabularies(directory)
    for file in [*map(directory.joinpath, _JSON), *texts, *models]:
        if file.is_file():
            check_is_no_pointer(file)
    try:
        for file in filter(Path.is_file, texts):
            read_text(file)
    except DataError as error:
        raise ModelLoadError(str(error)) from error
    if any((directory / file).is_file() for file in _ADAPTER_FILES):
        file = directory / ADAPTER_CONFIG
        adapter = read_json(file) if file.is_file() else {}
        base = adapter.get("base_model_name_or_path") or adapter.get("model") or "another model"
        kind = adapter.get("peft_type") or adapter.get("fine_tune_type") or "PEFT"
        raise ModelLoadError(f"{name} has an adapter ({kind}) of {base} in it; {_MERGE}")
    for file in map(directory.joinpath, _SETTINGS):
        if file.is_file():
            read_json(file)
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    files = [directory / file for file in _QUANTISATION_FILES]
    beside = [{"quantization": read_json(file)} for file in files if file.is_file()]
    for part in [config, *(v for v in config.values() if isinstance(v, dict)), *beside]:
        method = _quantisation(part)
        if method is not None:
            raise ModelLoadError(_quantised_message(name, method))
    _check_tokenizer_package(directory, name)


def check_weights(directory: Path, name: str) -> None:
    """Validate which weights a directory holds, by the headers of its safetensors files.

    Raises:
        ModelLoadError: a file is missing, not whole or a Git LFS pointer, or the weights are those
            of a quantised model or of an adapter.
        SafetensorError: a file can't be read.
    """
    dtypes: dict[str, str] = {}
    for file in weight_files(directory, name):
        with safe_open(file, framework="numpy") as opened:
            own = {key: opened.get_slice(key).get_dtype() for key in opened.keys()}  # noqa: SIM118
        twice = sorted(own.keys() & dtypes.keys())
        if twice:
            raise ModelLoadError(
                f"{name} holds {twice[0]} in more than one file; get all parts from one place"
            )
        dtypes |= own
    of_adapter = [key for key in dtypes if _ADAPTER.search(key)]
    if of_adapter:
        raise ModelLoadError(
            f"{name} holds weights of an adapter ({min(of_adapter)}) that is not merged; {_MERGE}"
        )
    for key, dtype in sorted(dtypes.items()):
        is_weight = key.endswith(".weight") or dtype.startswith(("F4", "F6", "F8"))
        if is_weight and dtype not in _FLOATS:
            raise ModelLoadError(_quantised_message(name, f"{key} is stored in {dtype}"))
        if _QUANTISED.search(key):
            raise ModelLoadError(_quantised_message(name, f"it has {key}"))
    layers = read_json(directory / CONFIG).get("num_hidden_layers", 0)
    if dtypes and isinstance(layers, int) and layers > len(dtypes):
        raise ModelLoadError(
            f"the config.json of {name} speaks of {layers} layers, and there are {len(dtypes)} "
            "tensors; get config and weights from one place"
        )


def quantization_settings(directory: Path) -> dict[str, Any]:
    """How a directory says that its weights are quantised; empty where it doesn't.

    Raises:
        ModelLoadError: a file is damaged.
    """
    config = read_json(directory / CONFIG) if (directory / CONFIG).is_file() else {}
    for part in [config, *(v for v in config.values() if isinstance(v, dict))]:
        for key in _QUANTISATION_KEYS:
            settings = part.get(key)
            if isinstance(settings, dict) and settings:
                return settings
    for file, method in _METHODS_OF_FILES.items():
        if (directory / file).is_file():
            return {"quant_method": method, **read_json(directory / file)}
    return {}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file, with a byte order mark or without.

    Raises:
        ModelLoadError: it is none, or holds something else than names and values.
    """
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is no valid JSON ({error}); get it again") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} holds no settings; get the model's own {file.name}")
    return value


@contextmanager
def readable(directory: Path) -> Iterator[Path]:
    """A directory as transformers reads it.

    That is the directory itself, or a folder of links to its files where JSON begins with a byte
    order mark or is not UTF-8, where config.json names a dtype that PyTorch hasn't or attention
    that needs more than PyTorch, or where the index lacks its metadata: there these files are
    written anew.
    """
    changed: dict[str, Any] = {}
    for file in [directory / name for name in _JSON if (directory / name).is_file()]:
        with file.open("rb") as opened:
            if json.detect_encoding(opened.read(4)) != "utf-8":
                changed[file.name] = json.loads(file.read_bytes())
    if (directory / CONFIG).is_file():
        config = read_json(directory / CONFIG)
        known = _without_odd_settings(config)
        if known != config:
            changed[CONFIG] = known
    if (directory / INDEX).is_file():
        index = read_json(directory / INDEX)
        if not isinstance(index.get("metadata"), dict):  # of which nothing is needed
            changed[INDEX] = {**index, "metadata": {}}
    if not changed:
        yield directory
        return
    with TemporaryDirectory(prefix="river-llm-") as folder:
        for file in directory.iterdir():
            if file.name not in changed:
                Path(folder, file.name).symlink_to(file.resolve())
        for name, value in changed.items():
            Path(folder, name).write_text(json.dumps(value), encoding="utf-8")
        yield Path(folder)


def _without_odd_settings(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _without_odd_settings(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if (key not in ("dtype", "torch_dtype") or _is_dtype(value))
        and (key not in _ATTENTION_KEYS or value in ATTENTIONS)
    }


def _is_dtype(value: object) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _quantised_message(name: str, how: str) -> str:
    fix = "take the original weights"
    if how.startswith(_OF_RIVERS):
        fix += f", of which it may become the river: river-llm build MODEL --from {name} -o DIR"
    return f"{name} is quantised already ({how}); {fix}"


def _quantisation(part: dict[str, Any]) -> str | None:
    """How a part of a configuration says that its weights are quantised; None: they aren't."""
    for key in _QUANTISATION_KEYS:
        settings = part.get(key)
        if not settings:
            continue
        if not isinstance(settings, dict):
            return str(settings)
        if isinstance(settings.get("quantization"), dict):  # of ModelOpt
            settings = settings["quantization"]
            if not settings.get("quant_algo"):
                continue  # the KV cache alone
        is_mlx = key == "quantization" and "group_size" in settings
        named = [str(settings[one]) for one in _METHOD_KEYS if settings.get(one)]
        method = next(iter(named), "MLX" if is_mlx else "some method")
        bits = _bits(settings)
        return method if bits is None else f"{method}, {bits} bits"
    return None


def _bits(settings: dict[str, Any]) -> int | None:
    """The width that settings of a quantiser name, at any depth."""
    widths: list[Any] = [bits for bits in (4, 8) if settings.get(f"load_in_{bits}bit")]
    widths += [settings.get(key) for key in _BITS_KEYS]
    widths += [_bits(value) for value in settings.values() if isinstance(value, dict)]
    return next((bits for bits in widths if isinstance(bits, int)), None)


def weight_files(directory: Path, name: str) -> list[Path]:
    """The safetensors files of a model; none where there are none at all.

    Raises:
        ModelLoadError: one of them is missing, not whole or a Git LFS pointer.
    """
    if (directory / WEIGHTS).is_file():
        files = [directory / WEIGHTS]
        if (directory / INDEX).is_file():
            _log.warning("%s has an %s too, and %s is taken", name, INDEX, WEIGHTS)
    elif (directory / INDEX).is_file():
        shard_of = read_json(directory / INDEX).get("weight_map")
        if not isinstance(shard_of, dict) or not shard_of:
            raise ModelLoadError(f"{directory / INDEX} names no tensors; get it again")
        files = [directory / shard for shard in sorted(set(map(str, shard_of.values())))]
    else:
        files = []
    places = (directory, directory / ".cache" / "huggingface" / "download")  # of `hf download`
    partial = [p for place in places for p in place.glob("*") if p.suffix in _PARTIAL]
    unfinished = [path for path in partial if directory / path.stem in files]
    missing = [file for file in files if not file.is_file()]
    if unfinished or (partial and (missing or not files)):
        path = (unfinished or partial)[0]
        raise ModelLoadError(f"the download of {name} is not finished ({path}); run it again")
    if missing:
        raise ModelLoadError(
            f"{name} lacks {missing[0].name}, which its {INDEX} names; get all parts of it"
        )
    shards = sorted(directory.glob("*-?????-of-?????.safetensors"))
    if not files and shards:
        raise ModelLoadError(
            f"{name} holds {len(shards)} parts of weights, {shards[0].name} among them, without "
            f"their {INDEX}; get it too"
        )
    others = sorted(directory.glob("*.safetensors"))
    if not files and others:
        raise ModelLoadError(
            f"{name} holds {others[0].name} and no {WEIGHTS}, which is what is read; get it too, "
            "or give the file that name if it has the tensors' names of transformers"
        )
    for file in files:
        check_is_no_pointer(file)
    return files


def _check_tokenizer_package(directory: Path, name: str) -> None:
    """Validate that a vocabulary which is there in one form only can be read in it."""
    if (directory / "tokenizer.json").is_file() or (directory / "vocab.json").is_file():
        return
    for file in _vocabularies(directory)[:1]:
        with file.open("rb") as opened:
            is_text = opened.read(1) != b"\n"  # a SentencePiece model begins with its first field
        kind = "tiktoken" if is_text else "SentencePiece"
        packages = ["tiktoken"] if is_text else ["sentencepiece", "google.protobuf"]
        if not all(map(_is_installed, packages)):
            names = " ".join(packages).replace("google.", "")
            raise ModelLoadError(
                f"the tokenizer of {name} is a {kind} model ({file.name}), and what reads it is "
                f"not installed; run: pip install {names}"
            )


def _vocabularies(directory: Path) -> list[Path]:
    files = [directory / "tokenizer.model", *sorted(directory.glob("*.tiktoken"))]
    return [file for file in files if file.is_file()]


def _is_installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even what it is a part of
        return False
