"""Checkpoints of GPTQ, AWQ and compressed-tensors: safetensors files, and a config.json that says
how they are quantised. Nothing is executed or unpickled."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from river_llm.errors import ModelLoadError
from river_llm.load.checkpoint import TEXT_PART_NAMES, quantization_settings, weight_files
from river_llm.load.quantized.grouped import GroupedWeight
from river_llm.load.quantized.packings import (
    Unpack,
    unpack_awq,
    unpack_compressed_tensors,
    unpack_gptq,
)

METHODS = "GPTQ, AWQ, compressed-tensors, or GGUF"
_ZERO_SHIFTS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, slots=True)
class _Format:
    """What a linear layer's weight is made of.

    Attributes:
        needed: its tensors, codes first, then scales.
        optional: those that not all checkpoints have.
        group_axis: of the scales, that of the groups.
    """

    unpack: Unpack
    needed: tuple[str, ...]
    optional: tuple[str, ...] = ()
    group_axis: int = 0


class SafetensorsCheckpoint:
    """The tensors of a directory by their names in `transformers`.

    Attributes:
        method: how they were quantised: ``"gptq"``.
    """

    def __init__(self, directory: Path, name: str) -> None:
        """
        Args:
            name: of the checkpoint, as the user gave it.

        Raises:
            ModelLoadError: its method isn't known, or a file is missing.
        """
        self._name = name
        settings = quantization_settings(directory)
        self.method = str(settings.get("quant_method", "none")).lower()
        self._format = self._find_format(settings)
        files = weight_files(directory, name)
        if not files:
            raise ModelLoadError(
                f"{name} holds no safetensors weights; take a checkpoint that does, or a GGUF file"
            )
        self._file_of: dict[str, tuple[str, Any]] = {}  # by the backbone's names
        for file in files:
            opened: Any = safe_open(file, framework="pt")
            for key in opened.keys():  # noqa: SIM118
                self._file_of[_of_text_part(key)] = key, opened

    def is_quantized(self, name: str) -> bool:
        """Whether a linear layer's weight is codes."""
        return f"{name}.{self._format.needed[0]}" in self._file_of

    def group_size(self, name: str, columns: int) -> int:
        """Inputs of such a layer that share a scale, of `columns`; 0: its scales are missing."""
        scales = f"{name}.{self._format.needed[1]}"
        if scales not in self._file_of:
            return 0
        key, opened = self._file_of[scales]
        shape = opened.get_slice(key).get_shape()
        return columns // max(shape[self._format.group_axis], 1) if shape else 0

    def vector(self, name: str) -> Tensor | None:
        """A norm's weight."""
        return self._tensor(name) if name in self._file_of else None

    def weight(self, name: str, shape: tuple[int, int]) -> GroupedWeight | Tensor:
        """A linear layer's weight `[out_features, in_features]`, by the layer's name.

        Raises:
            ModelLoadError: it isn't there, or is none of the backbone's.
        """
        if not self.is_quantized(name):
            if f"{name}.weight" not in self._file_of:
                raise ModelLoadError(
                    "is missing; take a checkpoint of this very model, with all its parts"
                )
            return self._plain(f"{name}.weight", shape)
        missing = [part for part in self._format.needed if f"{name}.{part}" not in self._file_of]
        if missing:
            raise ModelLoadError(f"lacks its {missing[0]}; get the whole set of files")
        parts = {
            part: self._tensor(f"{name}.{part}")
            for part in (*self._format.needed, *self._format.optional)
            if f"{name}.{part}" in self._file_of
        }
        return self._format.unpack(parts, shape)

    def _plain(self, name: str, shape: tuple[int, int]) -> Tensor:
        weight = self._tensor(name)
        if tuple(weight.shape) != shape or not weight.is_floating_point():
            raise ModelLoadError(
                f"is {list(weight.shape)} in {weight.dtype}, and the backbone's {list(shape)}; "
                "take a checkpoint of this very model"
            )
        return weight.float()

    def _tensor(self, name: str) -> Tensor:
        key, opened = self._file_of[name]
        tensor: Tensor = opened.get_tensor(key)
        return tensor

    def _find_format(self, settings: dict[str, Any]) -> _Format:
        kind = str(settings.get("checkpoint_format") or settings.get("format") or "").lower()
        if self.method == "gptq":
            kind = kind or "gptq"
            if kind not in _ZERO_SHIFTS:
                raise self._unknown_format(kind, " or ".join(_ZERO_SHIFTS))
            unpack = partial(unpack_gptq, zero_shift=_ZERO_SHIFTS[kind])
            return _Format(unpack, ("qweight", "scales", "qzeros"), ("g_idx",))
        if self.method == "awq":
            kind = str(settings.get("version") or kind or "gemm").lower()
            if kind != "gemm":
                raise self._unknown_format(kind, "gemm")
            return _Format(unpack_awq, ("qweight", "scales", "qzeros"))
        if self.method == "compressed-tensors":
            if kind != "pack-quantized":
                raise self._unknown_format(kind or "none", "pack-quantized")
            return _Format(
                partial(unpack_compressed_tensors, widths=_compressed_widths(settings)),
                ("weight_packed", "weight_scale"),
                ("weight_zero_point", "weight_shape", "weight_g_idx"),
                group_axis=-1,
            )
        how = "isn't quantised" if self.method == "none" else f"is quantised by {self.method}"
        raise ModelLoadError(f"{self._name} {how}; take a checkpoint of {METHODS}")

    def _unknown_format(self, kind: str, known: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self._name} is of {self.method}'s format {kind!r}; take one of the format {known}"
        )


def _of_text_part(name: str) -> str:
    """A tensor's name in the text part of a model that takes images too."""
    for pattern, replacement in TEXT_PART_NAMES.items():
        name = re.sub(pattern, replacement, name)
    return name


def _compressed_widths(settings: dict[str, Any]) -> frozenset[int]:
    """The bits of integer weights that its groups name."""
    groups = settings.get("config_groups")
    named = groups.values() if isinstance(groups, dict) else ()
    weights = [group.get("weights") for group in named if isinstance(group, dict)]
    return frozenset(
        one["num_bits"]
        for one in weights
        if isinstance(one, dict) and one.get("type", "int") == "int" and "num_bits" in one
    )
