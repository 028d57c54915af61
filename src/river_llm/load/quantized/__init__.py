"""The river out of a checkpoint of the same model that is quantised already."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from river_llm.config import GROUP_SIZES, RiverConfig
from river_llm.errors import ConfigError, ModelLoadError
from river_llm.load.checkpoint import DESCRIPTIONS
from river_llm.load.errors import one_clear_line
from river_llm.load.quantized.against_backbone import ImportedMatrix, check_norm, in_river
from river_llm.load.quantized.gguf_checkpoint import GGUFCheckpoint, read_known
from river_llm.load.quantized.grouped import GroupedWeight
from river_llm.load.quantized.safetensors_checkpoint import METHODS, SafetensorsCheckpoint
from river_llm.load.source import gguf_parts, resolve
from river_llm.river.backbone import (
    DecoderLayer,
    check_in_memory,
    check_plain_decoder,
    decoder_layers,
    fingerprint,
    linear_weight,
)
from river_llm.river.quantize import QuantizedMatrix, average_bits
from river_llm.river.river import Progress, River

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Checkpoint(Protocol):
    """Weights of a model, some of them codes, by the model's names."""

    @property
    def method(self) -> str:
        """How they were quantised."""

    def is_quantized(self, name: str) -> bool:
        """Whether a linear layer's weight is codes."""

    def group_size(self, name: str, columns: int) -> int:
        """Inputs of such a layer that share a scale, of `columns`."""

    def vector(self, name: str) -> Tensor | None:
        """A norm's weight."""

    def weight(self, name: str, shape: tuple[int, int]) -> GroupedWeight | Tensor:
        """A linear layer's weight, `[out_features, in_features]`."""


@dataclass(frozen=True, slots=True)
class Import:
    """A river out of a checkpoint.

    Attributes:
        river: all of it.
        num_requantized: of its matrices, those that hold other codes than the checkpoint.
        least_cosine: of a matrix with the backbone's.
    """

    river: River
    num_requantized: int
    least_cosine: float

    def describe(self) -> str:
        """What became of its matrices, in words."""
        total = sum(map(len, self.river.exit_layers))
        anew = f"{self.num_requantized} of {total} matrices quantised anew, "
        least = f"least cosine with the backbone {self.least_cosine:.4f}"
        return f"{anew if self.num_requantized else ''}{least}"


def import_river(
    model: PreTrainedModel, name_or_path: str | Path, progress: Progress | None = None
) -> Import:
    """The river of `model` out of a checkpoint of the same model in few bits: GPTQ, AWQ,
    compressed-tensors (safetensors, a directory or a Hub id) or GGUF.

    Codes stay; their scales are rounded to bfloat16. What a river can't hold is quantised anew, in
    8 bits: blocks of 16, grids of unequal steps, and weights that the checkpoint has in full.

    Args:
        progress: called after each layer with (layers done, layers in all).

    Raises:
        ModelLoadError: there is no such checkpoint, it is damaged or of an unknown format, has
            columns in the order of activations or factors in its norms, or is another model's.
        UnsupportedModelError: a layer of `model` is no plain decoder layer.
        RiverError: layers are evicted.
        ConfigError: no group size divides the widths of `model`.
    """
    layers = decoder_layers(model)
    check_in_memory(layers)
    check_plain_decoder(model, layers)
    name = str(name_or_path)
    source, gguf_file = resolve(name_or_path)
    with one_clear_line(name, gguf_file):
        checkpoint = _open(source, gguf_file, name, model, layers)
        group_size = _group_size(checkpoint, name, layers)
        made = []
        for done, layer in enumerate(layers, start=1):
            made.append(_exit_layer(checkpoint, name, layer, group_size))
            if progress:
                progress(done, len(layers))
    exit_layers = [{key: one.matrix for key, one in layer.items()} for layer in made]
    matrices = [one for layer in made for one in layer.values()]
    river = River(
        _config([one.matrix for one in matrices]),
        exit_layers,
        fingerprint(layers),
        model.config.model_type,
        f"{checkpoint.method}: {name}",
    )
    return Import(
        river, sum(one.is_requantized for one in matrices), min(one.cosine for one in matrices)
    )


def _config(matrices: list[QuantizedMatrix]) -> RiverConfig:
    widths = {matrix.bits for matrix in matrices}
    group_size = matrices[0].group_size
    if len(widths) == 1:
        return RiverConfig(widths.pop(), group_size, "imported")
    # at most so many, and within the setting's range
    average = max(4.0, math.ceil(100 * average_bits(matrices)) / 100)
    return RiverConfig("auto", group_size, "imported", average)


def check_checkpoint(name_or_path: str | Path) -> None:
    """Validate what can be told of a checkpoint before there is a model.

    Raises:
        ModelLoadError: as of `import_river`.
        UnsupportedModelError: it is a mixture of experts.
    """
    source, gguf_file = resolve(name_or_path)
    with one_clear_line(str(name_or_path), gguf_file):
        if gguf_file is None:
            SafetensorsCheckpoint(_folder(source), str(name_or_path))
        else:
            read_known(gguf_parts(Path(source, gguf_file)), str(name_or_path))


def _open(
    source: str,
    gguf_file: str | None,
    name: str,
    model: PreTrainedModel,
    layers: list[DecoderLayer],
) -> Checkpoint:
    if gguf_file is not None:
        weights = [
            f"{layer.name}.{key}" for layer in layers for key, _ in layer.module.named_parameters()
        ]
        config = model.config.get_text_config(decoder=True)
        return GGUFCheckpoint(gguf_parts(Path(source, gguf_file)), name, weights, config)
    return SafetensorsCheckpoint(_folder(source), name)


def _folder(source: str) -> Path:
    """A directory, or that of a Hub id in the local cache, all of which is fetched."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = [*DESCRIPTIONS, "quant_config.json", "*.safetensors"]
    return Path(snapshot_download(source, allow_patterns=patterns))


def _group_size(checkpoint: Checkpoint, name: str, layers: list[DecoderLayer]) -> int:
    """The largest group size of a river that divides those of a checkpoint; the smallest, where
    these are none of a river's."""
    widths = {
        f"{layer.name}.{key}": linear_weight(linear).shape[1]
        for layer in layers
        for key, linear in layer.linears.items()
    }
    quantized = [key for key in widths if checkpoint.is_quantized(key)]
    if not quantized:
        raise ModelLoadError(
            f"{name} has no quantised linear layers of this model's, such as {next(iter(widths))}; "
            f"take a checkpoint of it in {METHODS}"
        )
    smallest = min(GROUP_SIZES)
    sizes = {checkpoint.group_size(key, widths[key]) for key in quantized}
    sizes = {smallest if size % smallest else size for size in sizes} | set(widths.values())
    for group_size in sorted(GROUP_SIZES, reverse=True):
        if all(size % group_size == 0 for size in sizes):
            return group_size
    odd = next(width for width in widths.values() if width % smallest)
    raise ConfigError(f"no group size divides the input width {odd}, so there can be no river")


def _exit_layer(
    checkpoint: Checkpoint, name: str, layer: DecoderLayer, group_size: int
) -> dict[str, ImportedMatrix]:
    for key, parameter in layer.module.named_parameters():
        if parameter.ndim == 1 and key.endswith(".weight"):
            norm = checkpoint.vector(f"{layer.name}.{key}")
            if norm is not None:
                with _named(f"{layer.name}.{key}", name):
                    check_norm(norm, parameter)
    exit_layer = {}
    for key, linear in layer.linears.items():
        own = linear_weight(linear).detach().cpu()
        rows, columns = own.shape
        with _named(f"{layer.name}.{key}", name):
            weight = checkpoint.weight(f"{layer.name}.{key}", (rows, columns))
            exit_layer[key] = in_river(weight, own, group_size)
    return exit_layer


@contextmanager
def _named(tensor: str, checkpoint: str) -> Iterator[None]:
    """Name a tensor of a checkpoint in what is said against it."""
    try:
        yield
    except ModelLoadError as error:
        raise ModelLoadError(f"{tensor} of {checkpoint} {error}") from error
