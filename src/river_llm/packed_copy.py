"""Packed copies: what the native engine holds of a model and its river, for a quick start.

Written once to the cache (`cache`) when an engine has packed a model's weights, and read into
memory at the next start, which needs no model of `transformers` then, nor the river's own file. A
folder of:

    weights.bin       the packed weights (csrc/packing.h): backbone, river, LM head
    embedding.bin     bfloat16, where its rows can't be read from the LM head
    parts.safetensors norms, biases, rotary frequencies
    packed.json       sizes, formats, the river's config, stop tokens
    tokenizer...      as `save_pretrained` writes it
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors.numpy import load_file, save_file

import river_llm
from river_llm.cache import CachedFolder, cache_directory, file_state, folder_for
from river_llm.config import RiverConfig
from river_llm.engines import CpuEngine, weight_layout
from river_llm.engines.native_core import holds_heads
from river_llm.engines.native_model import (
    NativeModel,
    RopeBoundary,
    RotaryTable,
    WeightFormats,
)
from river_llm.errors import RiverError
from river_llm.exit_policy import ExitPolicy
from river_llm.model_source import model_files
from river_llm.residency import OffloadConfig, ResidencyPlan
from river_llm.river import River

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Goes up with every change of what is packed, of the quantisers and of how files are read too.
FORMAT_VERSION = 3
_WEIGHTS, _EMBEDDING = "weights.bin", "embedding.bin"
_PARTS, _DESCRIPTION = "parts.safetensors", "packed.json"
_READ_BYTES = 16 << 20  # that a thread reads at a time

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PackedModel:
    """What a packed copy starts.

    Attributes:
        engine: with its weights in memory.
        river_config: how the river was quantised.
        stop_tokens: ids that end an answer.
        residency: which backbone layers stay in memory; None: all.
    """

    engine: CpuEngine
    tokenizer: PreTrainedTokenizerBase
    river_config: RiverConfig
    stop_tokens: frozenset[int]
    residency: ResidencyPlan | None = None


def packed_folder(
    name_or_path: str | Path,
    river: str | Path | RiverConfig | None,
    backbone_bits: int,
    lm_head_bits: int,
) -> CachedFolder | None:
    """Where the packed copy of a model and its river is, as their files are now.

    None where the cache is off, the native engine isn't built, a file can't be read, or the model
    isn't on this machine yet. A Hub model that is gets no request whether there is a newer one.

    Raises:
        ModelLoadError, RiverFileError: there is no such model or river.
    """
    layout = weight_layout()
    if layout is None or cache_directory() is None:
        return None
    try:
        found = model_files(name_or_path)
        if found is None:
            return None
        return _folder(*found, layout, river, backbone_bits, lm_head_bits)
    except OSError as error:
        _log.info("no packed copy of %s: %s", name_or_path, error)
        return None


def _folder(
    source: Path,
    files: list[Path],
    layout: int,
    river: str | Path | RiverConfig | None,
    backbone_bits: int,
    lm_head_bits: int,
) -> CachedFolder | None:
    saved = Path(river) if isinstance(river, str | Path) else None
    if saved is not None:
        config, identity = River.identity(saved)
    else:
        config = river if isinstance(river, RiverConfig) else RiverConfig()
        identity = {"config": config.to_dict()}
    of_river = f"{config.quantizer}{config.bits}g{config.group_size}"
    form = f"packed-{backbone_bits}-{lm_head_bits}-{of_river}"
    origin = {
        "format_version": FORMAT_VERSION,
        "weight_layout": layout,
        "river_llm": river_llm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "river": identity,
        "form": form,
        "files": {path.name: file_state(path) for path in files},
    }
    return folder_for("packed", source.name, source, form, origin, saved)


def read_packed(
    folder: CachedFolder,
    policy: ExitPolicy,
    threads: int | None = None,
    offload: OffloadConfig | None = None,
    kv_bits: int = 16,
) -> PackedModel | None:
    """Start from a packed copy, with a KV cache of so many bits; None where there is none, where
    the native engine has no such cache for the model, or where it is damaged, and removed then.

    Raises:
        ConfigError: the model can't be offloaded so.
    """
    read = partial(
        _read,
        source=folder.source,
        policy=policy,
        threads=threads,
        offload=offload,
        kv_bits=kv_bits,
    )
    packed: PackedModel | None = folder.read(read)
    return packed


def keep_packed(folder: CachedFolder, packed: PackedModel) -> None:
    """Write the copy; where that can't be done, there is none."""
    engine = packed.engine
    num_bytes = sum(engine.layer_bytes) + engine.rest_bytes
    folder.keep(num_bytes, partial(_write, packed=packed))


def offload_packed(
    engine: CpuEngine, folder: CachedFolder, config: OffloadConfig, policy: ExitPolicy
) -> ResidencyPlan:
    """Evict layers of an engine whose packed copy was just written.

    Raises:
        ConfigError: the model can't be offloaded so.
        RiverError: the copy isn't there.
    """
    plan = ResidencyPlan(config, engine.layer_bytes, engine.rest_bytes, policy)
    if not folder.is_whole():
        raise RiverError(
            f"offloading needs a packed copy of the model in {folder.directory.parent}, and it "
            "could not be written; see that there is room on the disk, or set RIVER_LLM_CACHE"
        )
    engine.offload_to(folder.directory / _WEIGHTS)
    engine.keep_layers(plan.resident)
    return plan


def write_engine(directory: Path, engine: CpuEngine) -> dict[str, Any]:
    """Write what an engine holds of its model, and return what describes it in JSON values."""
    description, arrays = _describe(engine.model)
    save_file(arrays, directory / _PARTS)
    with (directory / _WEIGHTS).open("wb") as weights:
        for part in engine.packed_weights:
            part.tofile(weights)
    if engine.embedding is not None:
        engine.embedding.tofile(directory / _EMBEDDING)
    return description | {
        "formats": asdict(engine.formats),
        "has_embedding": engine.embedding is not None,
        "layer_bytes": engine.layer_bytes,
        "rest_bytes": engine.rest_bytes,
        "head_bytes": engine.head_bytes,
    }


def read_engine(
    directory: Path,
    description: dict[str, Any],
    policy: ExitPolicy,
    threads: int | None,
    offload: OffloadConfig | None,
    *,
    kv_bits: int = 16,
    with_river: bool = True,
) -> tuple[CpuEngine, ResidencyPlan | None]:
    """The inverse of `write_engine`, with the layers in memory that `offload` asks for.

    Args:
        kv_bits: of the KV cache; what is packed is the same.
        with_river: False leaves the river's weights where they are, for measurements of what the
            backbone alone takes; no token may leave the backbone then.

    Raises:
        ConfigError: the model can't be offloaded so.
    """
    model = _native_model(description, load_file(directory / _PARTS))
    layer_bytes = description["layer_bytes"]
    plan = None
    if offload is not None:
        plan = ResidencyPlan(offload, layer_bytes, description["rest_bytes"], policy)

    def fill(weights: list[Any]) -> Any:
        *layers, rest = weights
        head = rest[-description["head_bytes"] :]
        river = rest[: rest.nbytes - head.nbytes] if with_river else None
        skipped_bytes = [*layer_bytes, rest.nbytes - head.nbytes]
        _read_into([*layers, river, head], directory / _WEIGHTS, skipped_bytes)
        if not description["has_embedding"]:
            return None
        embedding = np.empty((model.shape["vocab_size"], model.shape["hidden_size"]), np.uint16)
        _read_into([embedding.reshape(-1).view(np.uint8)], directory / _EMBEDDING)
        return embedding

    engine = CpuEngine.of_packed(
        model,
        WeightFormats(**description["formats"]),
        fill,
        threads=threads,
        kv_bits=kv_bits,
        resident_layers=None if plan is None else plan.resident,
    )
    if plan is not None:
        engine.offload_to(directory / _WEIGHTS)
    return engine, plan


def _write(directory: Path, packed: PackedModel) -> None:
    tokenizer = packed.tokenizer
    tokenizer.save_pretrained(directory)
    of_class = type(tokenizer)
    description = write_engine(directory, packed.engine) | {
        "river_config": packed.river_config.to_dict(),
        "stop_tokens": sorted(packed.stop_tokens),
        "tokenizer": [of_class.__module__, of_class.__qualname__],
    }
    again = _read_tokenizer(directory, description["tokenizer"])
    sample = "A text with 3 lines,\n\ttabs and \N{SNOWMAN}."
    if again(sample) != tokenizer(sample) or again.chat_template != tokenizer.chat_template:
        raise ValueError("the tokeniser is another one when it is read again")
    (directory / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def _read(
    directory: Path,
    source: Path,
    policy: ExitPolicy,
    threads: int | None,
    offload: OffloadConfig | None,
    kv_bits: int,
) -> PackedModel | None:
    description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
    if not holds_heads(description["shape"]["head_dim"], kv_bits):
        return None
    tokenizer = _read_tokenizer(directory, description["tokenizer"])
    # as if it had been read beside the model
    tokenizer.name_or_path = str(source.parent if source.is_file() else source)
    engine, plan = read_engine(directory, description, policy, threads, offload, kv_bits=kv_bits)
    return PackedModel(
        engine,
        tokenizer,
        RiverConfig.from_dict(description["river_config"]),
        frozenset(description["stop_tokens"]),
        plan,
    )


def _read_tokenizer(directory: Path, of_class: list[str]) -> PreTrainedTokenizerBase:
    """By its very class: to look for the right one takes a second."""
    module, name = of_class
    if not module.startswith("transformers."):
        raise ValueError(f"{name} is no tokeniser of transformers")
    tokenizer: PreTrainedTokenizerBase = getattr(
        importlib.import_module(module), name
    ).from_pretrained(directory)
    return tokenizer


def _read_into(arrays: Sequence[Any], path: Path, skipped_bytes: Sequence[int] = ()) -> None:
    """A file into uint8 arrays that lie in it one after the other, several pieces at a time.

    Args:
        skipped_bytes: how much of the file belongs to an array, where None stands in its place.
    """
    pieces: list[tuple[int, memoryview]] = []  # place in the file, memory
    end = 0
    for i, array in enumerate(arrays):
        if array is None:
            end += skipped_bytes[i]
            continue
        view = memoryview(array)
        starts = range(0, array.nbytes, _READ_BYTES)
        pieces += [(end + start, view[start : start + _READ_BYTES]) for start in starts]
        end += array.nbytes
    size = path.stat().st_size
    if size != end:
        raise ValueError(f"{path} has {size} bytes where {end} belong")

    def read(piece: tuple[int, memoryview]) -> None:
        start, memory = piece
        with path.open("rb", buffering=0) as opened:
            opened.seek(start)
            while memory.nbytes > 0:
                count = opened.readinto(memory)
                if not count:
                    raise ValueError(f"{path} ends before byte {size}")
                memory = memory[count:]

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(read, pieces))


def _describe(model: NativeModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """A model in JSON values and arrays."""
    arrays = {"final_norm": model.final_norm}
    layers = []
    for index, parts in enumerate(model.layers):
        numbers = {}
        for name, part in parts.items():
            if isinstance(part, np.ndarray):
                arrays[f"{index}.{name}"] = part
            else:
                numbers[name] = part
        layers.append(numbers)
    for place, table in enumerate(model.rotary):
        arrays[f"rotary.{place}"] = table.frequencies.numpy()
        if table.long_frequencies is not None:
            arrays[f"rotary.{place}.long"] = table.long_frequencies.numpy()
    description = {
        "shape": model.shape,
        "layers": layers,
        "rotary_scaling": [table.scaling for table in model.rotary],
        "rope_boundary": None if model.rope_boundary is None else asdict(model.rope_boundary),
        "query_scaling": model.query_scaling,
        "context_length": model.context_length,
    }
    return description, arrays


def _native_model(description: dict[str, Any], arrays: dict[str, Any]) -> NativeModel:
    """The inverse of `_describe`."""
    layers: list[dict[str, Any]] = [dict(numbers) for numbers in description["layers"]]
    for name, array in arrays.items():
        index, _, part = name.partition(".")
        if index.isdecimal():
            layers[int(index)][part] = array
    rotary = []
    for place, scaling in enumerate(description["rotary_scaling"]):
        long = arrays.get(f"rotary.{place}.long")
        rotary.append(
            RotaryTable(
                torch.from_numpy(arrays[f"rotary.{place}"]),
                scaling,
                None if long is None else torch.from_numpy(long),
            )
        )
    boundary, scaling = description["rope_boundary"], description["query_scaling"]
    return NativeModel(
        shape=description["shape"],
        layers=layers,
        final_norm=arrays["final_norm"],
        rotary=rotary,
        rope_boundary=None if boundary is None else RopeBoundary(**boundary),
        query_scaling=None if scaling is None else (scaling[0], scaling[1]),
        context_length=description["context_length"],
    )
