"""Which engine runs a model."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal, get_args

import torch

from river_llm.attachment import attach_river
from river_llm.config import is_whole_number
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.kv_cache import check_kv_bits
from river_llm.engines.llama import check_supported
from river_llm.engines.native_core import check_built, is_built, usable_threads
from river_llm.engines.step import Engine
from river_llm.engines.torch import TorchEngine
from river_llm.engines.weight_packer import check_weights
from river_llm.errors import ConfigError, UnsupportedModelError
from river_llm.loading import check_loadable
from river_llm.river import River

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EngineChoice = Literal["auto", "cpu", "torch"]
MAX_THREADS = 1024  # of the core

_log = logging.getLogger(__name__)


def why_not_native(model: PreTrainedModel, kv_bits: int = 16) -> str | None:
    """Why the native engine doesn't serve this model with such a KV cache; None: it does."""
    if model.device.type != "cpu":
        return f"the model is on {model.device}"
    if not is_built():
        return "the native engine was not built, for want of a compiler"
    if model.dtype != torch.bfloat16:
        return f"the model is in {str(model.dtype).removeprefix('torch.')}, not bfloat16"
    try:
        check_supported(model, kv_bits)
    except UnsupportedModelError as error:
        return str(error).removesuffix("; take --engine torch")
    return None


def check_dtype(dtype: torch.dtype, choice: EngineChoice) -> None:
    """Refuse a dtype that the engine doesn't compute in, before anything is loaded.

    Raises:
        ConfigError: no engine computes in it, or the named one doesn't.
    """
    check_loadable(dtype)
    if choice == "cpu" and dtype != torch.bfloat16:
        name = str(dtype).removeprefix("torch.")
        raise ConfigError(
            f"the native engine computes in bfloat16, not in {name}; leave the dtype out, or take "
            "--engine torch"
        )


def check_threads(threads: int | None) -> None:
    """Refuse a number of threads that no engine takes, before anything is loaded. More than the
    process has cores are taken, and a warning is logged.

    Raises:
        ConfigError: it is no whole number from 1 to `MAX_THREADS`.
    """
    if threads is None:
        return
    if not is_whole_number(threads) or not 1 <= threads <= MAX_THREADS:
        raise ConfigError(
            f"threads is {threads!r}; it must be a whole number from 1 to {MAX_THREADS}"
        )
    _warn_of_many(threads, usable_threads())


@cache
def _warn_of_many(threads: int, usable: int) -> None:
    """Once in a process."""
    if threads > usable:
        cores = f"{usable} core{'s' * (usable > 1)}"
        _log.warning(
            "%d threads share the %s that this process may use, and wait for each other; "
            "leave the threads out, or take %d at most",
            threads,
            cores,
            usable,
        )


def check_engine_options(
    choice: EngineChoice, backbone_bits: int, lm_head_bits: int, kv_bits: int = 16
) -> None:
    """Refuse what no engine takes, before anything is loaded.

    Raises:
        ConfigError: a setting is out of its range, or the named engine hasn't it.
        RiverError: the native engine is named and was not built.
    """
    if choice not in get_args(EngineChoice):
        names = ", ".join(get_args(EngineChoice))
        raise ConfigError(f"engine is {choice!r}; choose one of {names}")
    for name, bits in (("backbone", backbone_bits), ("LM head", lm_head_bits)):
        if bits not in (8, 16):
            raise ConfigError(f"the {name} has {bits} bits; choose 16 (bfloat16) or 8")
        if bits == 8 and choice == "torch":
            raise ConfigError(f"8 bits of the {name} are for the native engine; take --engine cpu")
    check_kv_bits(kv_bits)
    if choice == "cpu":
        check_built()


def choose_engine(
    model: PreTrainedModel,
    choice: EngineChoice,
    backbone_bits: int,
    lm_head_bits: int,
    kv_bits: int = 16,
) -> tuple[Literal["cpu", "torch"], str | None]:
    """Which engine serves a model, and why it isn't the native one; needs no river yet.

    Returns:
        (name, None), or under ``"auto"`` where PyTorch serves ("torch", reason).

    Raises:
        ConfigError: a setting or the model's device is not for the engine.
        UnsupportedModelError: the architecture, or the width of its heads, is not for the engine.
    """
    reason = why_not_native(model, kv_bits) if choice == "auto" else None
    if choice == "cpu" or (choice == "auto" and reason is None):
        if model.device.type != "cpu":
            raise ConfigError(f"the native engine needs the model on a CPU, not on {model.device}")
        check_supported(model, kv_bits)
        return "cpu", None
    if (backbone_bits, lm_head_bits) != (16, 16):
        why = f": {reason}" if reason else ""
        raise ConfigError(f"8-bit weights beside the river need the native engine{why}")
    return "torch", reason


def make_engine(
    model: PreTrainedModel,
    river: River,
    choice: EngineChoice = "auto",
    *,
    threads: int | None = None,
    backbone_bits: int = 16,
    lm_head_bits: int = 16,
    kv_bits: int = 16,
) -> tuple[Engine, str | None]:
    """The engine for a model that this call takes over, and why it isn't the native one.

    Args:
        choice: ``"cpu"`` is the native engine; ``"auto"`` takes it where the model is in bfloat16,
            on a CPU and one that it supports, and the torch engine elsewhere.
        threads: by default as many as the process may use.
        backbone_bits, lm_head_bits: 16 (bfloat16), or 8 on the native engine.
        kv_bits: of the KV cache: 16, which stands for the model's dtype, or 8.

    Returns:
        (engine, None), or with the torch engine under ``"auto"`` (engine, reason).

    Raises:
        ConfigError: a setting is out of its range or not for the engine.
        UnsupportedModelError: the architecture, or the width of its heads, is not for the engine.
        RiverFileError: the river was made from other weights.
        RiverError: the native engine is named and was not built.
    """
    check_engine_options(choice, backbone_bits, lm_head_bits, kv_bits)
    check_weights(model)
    name, reason = choose_engine(model, choice, backbone_bits, lm_head_bits, kv_bits)
    if name == "cpu":
        engine = CpuEngine(
            model,
            river,
            threads=threads,
            backbone_bits=backbone_bits,
            lm_head_bits=lm_head_bits,
            kv_bits=kv_bits,
            free_model=True,
        )
        return engine, None
    if threads is not None:
        torch.set_num_threads(threads)
    return TorchEngine(attach_river(model, river), kv_bits), reason
