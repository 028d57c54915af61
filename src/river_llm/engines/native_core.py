"""The compiled core: whether it is there, one for a model, and the angles of its positions."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from river_llm.engines.kv_cache import check_kv_bits
from river_llm.engines.native_model import NativeModel, WeightFormats
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
    """Validate that it was.

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
    boundary = _table_boundary(model)
    try:
        core = _core.Engine(
            model.shape | {"rope_kinds": len(model.rotary), "rope_boundary": boundary or 0},
            backbone=(backbone_bits, model.code_group_size if backbone_bits == 8 else 0),
            river=(formats.river_bits, formats.river_group_size),
            head=(head_bits, model.head_group_size if head_bits == 8 else 0),
            threads=usable_threads() if threads is None else threads,
            kernels=kernels or os.environ.get(_KERNELS_VARIABLE, ""),
            kv_bits=kv_bits,
            resident_layers=len(model.layers) if resident_layers is None else resident_layers,
        )
    except ValueError as error:
        raise ConfigError(f"native engine: {error}") from error
    for index, parts in enumerate(model.layers):
        core.load_layer(index, parts)
    core.load_head({"final_norm": model.final_norm})
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
    """The rotary angles and query scales that a core has, which grow with the longest text."""

    def __init__(self, core: Any, model: NativeModel) -> None:
        self._core = core
        self._model = model
        self._boundary = _table_boundary(model)
        self.cover(min(_ROTARY_BLOCK, model.context_length or _ROTARY_BLOCK))

    def cover(self, end: int) -> None:
        """Have those of the positions before `end`."""
        have = self._core.positions
        if have >= end:
            return
        limit = self._model.context_length or end
        end = max(end, min(-(-end // _ROTARY_BLOCK) * _ROTARY_BLOCK, limit))
        tables = self._model.rotary
        if self._boundary is None:
            angles = [table.angles(have, end) for table in tables]
        else:
            short = min(have, self._boundary), min(end, self._boundary)
            angles = [table.angles(*short) for table in tables]
            angles += [table.angles(have, end, is_long=True) for table in tables]
        scales = self._model.query_scales(have, end)
        self._core.load_positions(
            have, [(cosines.numpy(), sines.numpy()) for cosines, sines in angles], scales.numpy()
        )


def _table_boundary(model: NativeModel) -> int | None:
    """The length of a text beyond which its rotary angles are the long ones; None: nowhere."""
    boundary = model.rope_boundary
    if boundary is None or all(table.long_frequencies is None for table in model.rotary):
        return None
    return boundary.positions
