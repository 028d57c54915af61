"""What decides over the keys and values that an engine writes, beside tokens, exits and angles.

Each function gives a few values by name. Where all of them are equal, two runs write the same keys
and values for the same tokens, on the native engine bit for bit. Large weights go in by samples,
which tell other weights and are no defence against someone who wants to fool them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from torch import Tensor

from river_llm.engines.native_core import cache_layout
from river_llm.engines.native_model import NativeModel, WeightFormats
from river_llm.river.quantize import QuantizedMatrix

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STRIDE = 2654435761  # a prime near 2**32 / golden ratio: samples are spread evenly
_LINE_BYTES, _LINES = 64, 512  # of packed weights: samples of each layer
_VALUES, _WHOLE = 1024, 1 << 14  # of other weights: samples of each, the most that is taken whole
# Of a model's config: what changes with the way it was loaded and no key or value depends on.
_NAMES = ("architectures", "dtype", "transformers_version", "use_cache", "return_dict")


def native_identity(
    core: Any,
    model: NativeModel,
    formats: WeightFormats,
    embedding: Any,
    token_ids: Sequence[int],
) -> dict[str, str]:
    """Of the native engine. The LM head doesn't count, only the embedding of the tokens, as far as
    there are such tokens.

    Args:
        embedding: see `CpuEngine`; None where its rows are the LM head's.
    """
    model_digest = hashlib.sha256(_json([model.shape, formats.backbone_bits]))
    for parts in model.layers:
        for name, part in sorted(parts.items()):
            _add(model_digest, name, part)
    for table in model.rotary:
        _add(model_digest, "rotary", table.frequencies.numpy())
        if table.long_frequencies is not None:
            _add(model_digest, "long rotary", table.long_frequencies.numpy())
        _add(model_digest, "scaling", table.scaling)
    boundary = model.rope_boundary
    _add(model_digest, "limit", [boundary and asdict(boundary), model.query_scaling])
    for token in _known(token_ids, model.shape["vocab_size"]):
        model_digest.update(core.head_rows(token, 1) if embedding is None else embedding[token])
    river_digest = hashlib.sha256(_json([formats.river_bits, formats.river_group_size]))
    *backbone, rest = core.packed_weights  # rest: river, LM head
    start = 0
    for layer, weights in enumerate(backbone):
        size = core.layer_bytes(layer, 0)
        model_digest.update(_sampled_layer(core, weights, layer * size, size))
        end = start + core.layer_bytes(layer, 1)
        river_digest.update(_sampled(rest[start:end]))
        start = end
    return {
        "engine": "cpu",
        "kernels": core.kernels,
        "cache layout": str(cache_layout()),
        "KV cache bits": str(core.kv_bits),
        "backbone bits": str(formats.backbone_bits),
        "model": model_digest.hexdigest(),
        "river": river_digest.hexdigest(),
    }


def _sampled(weights: Any) -> Any:
    """Some of a uint8 array's lines."""
    lines = weights.reshape(-1, _LINE_BYTES)
    return lines[_places(_LINES, len(lines))]


def _sampled_layer(core: Any, weights: Any | None, start: int, size: int) -> Any:
    """The same lines of a backbone layer, in memory or not; its first byte is `start`."""
    if weights is not None:
        return _sampled(weights)
    places = _places(_LINES, size // _LINE_BYTES) * _LINE_BYTES + start
    return b"".join(bytes(core.stored_weights(place, place + _LINE_BYTES)) for place in places)


def torch_weights_digest(model: PreTrainedModel) -> str:
    """Of a model's config and of samples of its weights, but for embedding and LM head."""
    config = {
        name: value
        for name, value in model.config.to_dict().items()
        if name not in _NAMES and not name.startswith("_")
    }
    model_digest = hashlib.sha256(_json(config))
    embedding = model.get_input_embeddings().weight
    head = model.get_output_embeddings()
    apart = [embedding] if head is None else [embedding, head.weight]
    for name, parameter in model.named_parameters():
        if not any(parameter is weight for weight in apart):
            _add_tensor(model_digest, name, parameter.detach())
    return str(model_digest.hexdigest())


def torch_identity(
    model: PreTrainedModel,
    weights_digest: str,
    river: Iterable[QuantizedMatrix],
    kv_bits: int,
    token_ids: Sequence[int],
) -> dict[str, str]:
    """Of the torch engine: equal values give equal keys and values up to rounding.

    Args:
        weights_digest: see `torch_weights_digest`.
        kv_bits: of the KV cache.
    """
    model_digest = hashlib.sha256(weights_digest.encode())
    embedding = model.get_input_embeddings().weight
    rows = torch.tensor(_known(token_ids, len(embedding)), device=embedding.device)
    model_digest.update(_bytes(embedding.detach()[rows]))
    river_digest = hashlib.sha256()
    for matrix in river:
        for name in ("packed", "scales", "zeros"):
            _add_tensor(river_digest, name, getattr(matrix, name))
    return {
        "engine": "torch",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "KV cache bits": str(kv_bits),
        "model": model_digest.hexdigest(),
        "river": river_digest.hexdigest(),
    }


def _known(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    return sorted(token for token in set(token_ids) if token < vocab_size)


def _add_tensor(digest: Any, name: str, values: Tensor) -> None:
    """A few values of it, or all where it is small."""
    flat = values.reshape(-1)
    if len(flat) > _WHOLE:
        flat = flat[torch.from_numpy(_places(_VALUES, len(flat))).to(flat.device)]
    digest.update(f"{name} {tuple(values.shape)}\n".encode())
    digest.update(_bytes(flat))


def _add(digest: Any, name: str, part: Any) -> None:
    """A small array, or JSON values."""
    digest.update(name.encode())
    digest.update(part if isinstance(part, np.ndarray) else _json(part))


def _places(count: int, size: int) -> Any:
    """So many places spread over `size`, int64 `[count]`."""
    return np.arange(count) * _STRIDE % size


def _bytes(values: Tensor) -> Any:
    return values.contiguous().view(torch.uint8).cpu().numpy()


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode()
