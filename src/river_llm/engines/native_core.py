"""The compiled core: whether it is there, one for a model, and the angles of its positions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from river_llm.engines.kv_cache import check_kv_bits
from river_llm.engines.native_model import NativeModel, WeightFormats, held_bits
from river_llm.errors import ConfigError, RiverError

try:
    from river_llm import _core
except ImportError:  # installed without a compiler
    _core = None  # type: ignore[assignment]

MOST_DIMS_OF_CODES = 512  # of a head in a KV cache of 8 bits, as kv_cache.cpp has it
_ROTARY_BLOCK = 2048  # positions whose angles are computed at a time
_KERNELS_VARIABLE = "RIVER_LLM_CPU"


def is_built() -> bool:
    """Whether the native core was compiled when the package was installed."""
    return _core is not None


def weight_layout() -> int | None:
    """The version of how the core packs weights; None where it isn't built."""
    return None if _core is None else int(_core.weight_layout)


def cache_layout() -> int:
    """The version of how a page of the core's KV cache lies in memory."""
    return int(_core.cache_layout)


def usable_threads() -> int:
    """As many as the process has cores."""
    if is_built():
        return int(_core.usable_threads())
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_built() -> None:
    """See that it was.

    Raises:
        RiverError: it wasn't.
    """
    if not is_built():
        raise RiverError(
            "the native engine was not built, for want of a compiler; install g++ 12 or later "
            "and reinstall, or take --engine torch"
        )


def holds_heads(head_dim: int, kv_bits: int) -> bool:
    """Whether the core has a KV cache of so many bits for heads of that width."""
    return kv_bits == 16 or head_dim <= MOST_DIMS_OF_CODES


def make_core(
    model: NativeModel,
    formats: WeightFormats,
    threads: int | None,
    kernels: str | None,
    kv_bits: int = 16,
    resident_layers: int | None = None,
) -> Any:
    """A `_core.Engine` for a model, without weights.

    Args:
        threads: by default as many as the process may use.
        kernels: an instruction set in place of the best one; by default the environment variable
            RIVER_LLM_CPU.
        kv_bits: of the KV cache, 16 (bfloat16) or 8.
        resident_layers: memory is taken for the first so many backbone layers; None: for all.

    Raises:
        ConfigError: a setting is out of its range, or the processor has no such kernels.
    """
    backbone_bits, head_bits = formats.backbone_bits, formats.lm_head_bits
    for name, bits in (("backbone", backbone_bits), ("LM head", head_bits)):
        if bits not in (8, 16):
            raise ConfigError(f"the {name} has {bits} bits; choose 16 (bfloat16) or 8")
    check_kv_bits(kv_bits)
    try:
        core = _core.Engine(
            model.shape,
            backbone=(backbone_bits, model.code_group_size if backbone_bits == 8 else 0),
            river=(held_bits(formats.river_bits), formats.river_group_size),
            head=(head_bits, model.head_group_size if head_bits == 8 else 0),
            rotary_tables=len(model.rotary),
            threads=usable_threads() if threads is None else threads,
            kernels=kernels or os.environ.get(_KERNELS_VARIABLE, ""),
            kv_bits=kv_bits,
            resident_layers=len(model.layers) if resident_layers is None else resident_layers,
        )
    except ValueError as error:
        raise ConfigError(f"native engine: {error}") from error
    for index, parts in enumerate(model.layers):
        core.set_layer(index, parts)
    core.set_final_norm(model.final_norm)
    return core


@contextmanager
def one_clear_line() -> Iterator[None]:
    """What the core refuses, as a RiverError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        if isinstance(error, RiverError):
            raise
        raise RiverError(f"native engine: {error}") from error


class Positions:
    """The rotary angles and query scales that a core has, which grow with the text."""

    def __init__(self, core: Any, model: NativeModel) -> None:
        self._core = core
        self._model = model
        self._are_long: bool | None = False  # None: some positions have other angles
        limit = model.angle_limit
        changes_once = limit is not None and not limit.keep_changing
        self._limit = limit.positions if limit is not None and changes_once else None
        self.cover(min(_ROTARY_BLOCK, model.context_length or _ROTARY_BLOCK))

    def cover(self, end: int) -> None:
        """Have angles up to position `end`, those that a pass ending there takes."""
        is_long = self._limit is not None and end > self._limit
        have = self._core.positions
        if is_long != self._are_long:
            have = 0
        if have >= end and have > 0:
            return
        # round up, but not over the place where the angles change
        limit = self._model.context_length or end
        if self._limit is not None and not is_long:
            limit = min(limit, self._limit)
        end = max(end, min(-(-end // _ROTARY_BLOCK) * _ROTARY_BLOCK, limit))
        self._are_long = None
        for place, table in enumerate(self._model.rotary):
            cosines, sines = table.angles(have, end, is_long)
            self._core.set_rotary(place, have, cosines.numpy(), sines.numpy())
        scales = self._model.query_scales(end)
        if scales is not None:
            self._core.set_query_scales(scales.numpy())
        self._are_long = is_long
