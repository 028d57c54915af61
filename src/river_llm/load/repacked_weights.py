"""Repacked weights: what the native engine holds of a model and its river, for a quick start.

Written to the store when an engine has repacked a model's weights, and read into memory at the next
start, which needs no model of `transformers` then, nor the river's own file. A folder of:

    weights.bin         the packed weights (csrc/packing.h): backbone, river, LM head
    embedding.bin       bfloat16, where its rows can't be read from the LM head
    engine.safetensors  norms, biases, rotary frequencies; in its metadata, as JSON, the rest
    tokenizer...        as `save_pretrained` writes it
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

import river_llm
from river_llm.config import RiverConfig
from river_llm.engines import CpuEngine, Engine, weight_layout
from river_llm.engines.native_core import holds_heads
from river_llm.engines.native_model import NativeModel, RopeBoundary, RotaryTable, WeightFormats
from river_llm.errors import RiverError
from river_llm.load.source import model_files
from river_llm.river.policy import ExitPolicy
from river_llm.river.residency import OffloadConfig, ResidencyPlan
from river_llm.river.river import River
from river_llm.store import CachedFolder, cache_directory, file_state

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Goes up with every change of what is packed, of the quantisers and of how files are read too.
FORMAT_VERSION = 7
_WEIGHTS, _EMBEDDING, _DESCRIPTION = "weights.bin", "embedding.bin", "engine.safetensors"
_READ_BYTES = 16 << 20  # that a thread reads at a time

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Pretrained:
    """The parts of a `RiverLM`; see there.

    Attributes:
        river_config: how the river was quantised.
        residency: which backbone layers stay in memory; None: all.
    """

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    river_config: RiverConfig
    stop_tokens: frozenset[int]
    fallback_reason: str | None = None
    residency: ResidencyPlan | None = None


def packed_folder(
    name_or_path: str | Path,
    river: str | Path | RiverConfig | None,
    backbone_bits: int,
    lm_head_bits: int,
) -> CachedFolder | None:
    """The folder for a model and its river, as their files are now.

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
        files = {path.name: file_state(path) for path in found[1]}
        if isinstance(river, str | Path):
            config, identity = River.identity(Path(river))
        else:
            config = river or RiverConfig()
            identity = {"config": config.to_dict()}
    except OSError as error:
        _log.info("%s has no repacked weights: %s", name_or_path, error)
        return None
    origin = {
        "format_version": FORMAT_VERSION,
        "weight_layout": layout,
        "river_llm": river_llm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "river": identity,
        "files": files,
    }
    of_river = f"{config.quantizer}{config.width}g{config.group_size}"
    form = f"{backbone_bits}-{lm_head_bits}-{of_river}"
    saved = Path(river) if isinstance(river, str | Path) else None
    return CachedFolder.of("repacked", found[0], form, origin, saved)


def read_packed(
    folder: CachedFolder,
    policy: ExitPolicy,
    threads: int | None = None,
    offload: OffloadConfig | None = None,
    kv_bits: int = 16,
) -> Pretrained | None:
    """Start from repacked weights, with a KV cache of so many bits; None where there are none, they
    are damaged (and removed then), or the native engine has no such cache for the model.

    Raises:
        ConfigError: the model can't be offloaded so.
    """

    def read(directory: Path) -> Pretrained | None:
        description = _read_description(directory)
        if not holds_heads(description["model"]["shape"]["head_dim"], kv_bits):
            return None
        tokenizer = _read_tokenizer(directory, *description["tokenizer"])
        source = folder.source  # as if it had been read beside the model
        tokenizer.name_or_path = str(source.parent if source.is_file() else source)
        config = RiverConfig.of(description["river_config"])
        ends = frozenset(description["stop_tokens"])
        engine, plan = read_engine(directory, policy, threads, offload, kv_bits=kv_bits)
        return Pretrained(engine, tokenizer, config, ends, residency=plan)

    packed: Pretrained | None = folder.read(read)
    return packed


def keep_packed(
    folder: CachedFolder,
    engine: CpuEngine,
    tokenizer: PreTrainedTokenizerBase,
    river_config: RiverConfig,
    stop_tokens: frozenset[int],
) -> None:
    """Write it; where that can't be done, there is none."""
    of_class = type(tokenizer).__module__, type(tokenizer).__qualname__

    def write(directory: Path) -> None:
        tokenizer.save_pretrained(directory)
        again = _read_tokenizer(directory, *of_class)
        sample = "A text with 3 lines,\n\ttabs and \N{SNOWMAN}."
        if again(sample) != tokenizer(sample) or again.chat_template != tokenizer.chat_template:
            raise ValueError("the tokeniser is another one when it is read again")
        write_engine(
            directory,
            engine,
            river_config=river_config.to_dict(),
            stop_tokens=sorted(stop_tokens),
            tokenizer=of_class,
        )

    folder.keep(sum(engine.layer_bytes) + engine.rest_bytes, write)


def weights_file(folder: CachedFolder) -> Path:
    """The packed weights of a folder that was just written.

    Raises:
        RiverError: they aren't there.
    """
    if not folder.is_whole():
        raise RiverError(
            f"offloading needs the repacked-weight cache in {folder.directory.parent}, which could "
            "not be written; make room on the disk, or set RIVER_LLM_CACHE"
        )
    return folder.directory / _WEIGHTS


def write_engine(directory: Path, engine: CpuEngine, **beside: Any) -> None:
    """Write what an engine holds of its model, and plain values beside it."""
    with (directory / _WEIGHTS).open("wb") as weights:
        for part in engine.packed_weights:
            part.tofile(weights)
    if engine.embedding is not None:
        engine.embedding.tofile(directory / _EMBEDDING)
    description = {
        "model": asdict(engine.model),
        "formats": asdict(engine.formats),
        "has_embedding": engine.embedding is not None,
        "layer_bytes": engine.layer_bytes,
        "rest_bytes": engine.rest_bytes,
        "head_bytes": engine.head_bytes,
    }
    tensors: dict[str, torch.Tensor] = {}

    def stored(part: Any) -> dict[str, str]:
        name = str(len(tensors))
        tensors[name] = torch.as_tensor(part).clone()  # it may share memory with others
        return {type(part).__name__: name}

    text = json.dumps(description | beside, default=stored)
    save_file(tensors, directory / _DESCRIPTION, metadata={"description": text})


def read_engine(
    directory: Path,
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
    description = _read_description(directory)
    model = _native_model(description["model"])
    layer_bytes = description["layer_bytes"]
    plan = None
    if offload is not None:
        plan = ResidencyPlan(offload, layer_bytes, description["rest_bytes"], policy)

    def fill(weights: list[Any]) -> Any:
        *layers, rest = weights
        head_bytes = description["head_bytes"]
        river, head = rest[:-head_bytes], rest[-head_bytes:]
        sizes = [*layer_bytes, river.nbytes, head_bytes]
        arrays = [*layers, river if with_river else None, head]
        _read_into(arrays, directory / _WEIGHTS, sizes)
        if not description["has_embedding"]:
            return None
        embedding = np.empty((model.shape["vocab_size"], model.shape["hidden_size"]), np.uint16)
        _read_into(
            [embedding.reshape(-1).view(np.uint8)], directory / _EMBEDDING, [embedding.nbytes]
        )
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


def _read_description(directory: Path) -> dict[str, Any]:
    with safe_open(directory / _DESCRIPTION, framework="pt") as tensors:

        def restored(part: dict[str, Any]) -> Any:
            if part.keys() not in ({"Tensor"}, {"ndarray"}):
                return part
            ((kind, name),) = part.items()
            tensor = tensors.get_tensor(name).clone()  # the file may be cut or replaced
            return tensor.numpy() if kind == "ndarray" else tensor

        text = tensors.metadata()["description"]
        description: dict[str, Any] = json.loads(text, object_hook=restored)
    return description


def _native_model(parts: dict[str, Any]) -> NativeModel:
    boundary, scaling = parts["rope_boundary"], parts["query_scaling"]
    changed = {
        "rotary": [RotaryTable(**table) for table in parts["rotary"]],
        "rope_boundary": None if boundary is None else RopeBoundary(**boundary),
        "query_scaling": None if scaling is None else tuple(scaling),
    }
    return NativeModel(**parts | changed)


def _read_tokenizer(directory: Path, module: str, name: str) -> PreTrainedTokenizerBase:
    """By its very class: to look for the right one takes a second."""
    if not module.startswith("transformers."):
        raise ValueError(f"{name} is no tokeniser of transformers")
    tokenizer: PreTrainedTokenizerBase = getattr(
        importlib.import_module(module), name
    ).from_pretrained(directory)
    return tokenizer


def _read_into(arrays: Sequence[Any], path: Path, sizes: Sequence[int]) -> None:
    """A file into uint8 arrays that lie in it one after the other, several pieces at a time; what
    belongs where None stands is left out."""
    *starts, end = accumulate(sizes, initial=0)
    if path.stat().st_size != end:
        raise ValueError(f"{path} has {path.stat().st_size} bytes where {end} belong")
    pieces = [
        (start + within, memoryview(array)[within : within + _READ_BYTES])
        for start, array in zip(starts, arrays, strict=True)
        if array is not None
        for within in range(0, array.nbytes, _READ_BYTES)
    ]

    def read(piece: tuple[int, memoryview]) -> None:
        with path.open("rb") as opened:
            opened.seek(piece[0])
            if opened.readinto(piece[1]) != piece[1].nbytes:
                raise ValueError(f"{path} ends before byte {end}")

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        list(pool.map(read, pieces))
