"""Which engine runs a model."""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING, Literal

import torch

from river_llm.config import EngineConfig
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.llama import check_supported
from river_llm.engines.native_core import check_built, is_built, usable_threads
from river_llm.engines.step import Engine
from river_llm.engines.torch import TorchEngine
from river_llm.engines.weight_packer import check_weights
from river_llm.errors import ConfigError, UnsupportedModelError
from river_llm.river.attach import attach_river
from river_llm.river.policy import ExitPolicy
from river_llm.river.river import River

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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


@cache
def check_threads(threads: int | None) -> None:
    """Warn, once in a process, of more threads than cores; None: as many as there are."""
    usable = usable_threads()
    if threads is not None and threads > usable:
        _log.warning(
            "%d threads wait for each other on the cores that this process may use; "
            "leave the threads out, or take %d at most",
            threads,
            usable,
        )


def choose_engine(
    model: PreTrainedModel, config: EngineConfig
) -> tuple[Literal["cpu", "torch"], str | None]:
    """Which engine serves a model, and why it isn't the native one; needs no river yet.

    Returns:
        (name, None), or under ``"auto"`` where PyTorch serves ("torch", reason).

    Raises:
        ConfigError: a setting or the model's device is not for the engine.
        UnsupportedModelError: the architecture, or the width of its heads, is not for the engine.
    """
    reason = why_not_native(model, config.kv_bits) if config.engine == "auto" else None
    if config.engine == "cpu" or (config.engine == "auto" and reason is None):
        if model.device.type != "cpu":
            raise ConfigError(f"the native engine needs the model on a CPU, not on {model.device}")
        check_supported(model, config.kv_bits)
        return "cpu", None
    if (config.backbone_bits, config.lm_head_bits) != (16, 16):
        why = f": {reason}" if reason else ""
        raise ConfigError(f"8-bit weights beside the river need the native engine{why}")
    return "torch", reason


def make_engine(
    model: PreTrainedModel, river: River, config: EngineConfig | None = None
) -> tuple[Engine, str | None]:
    """The engine for a model that this call takes over, and why it isn't the native one.

    Returns:
        (engine, None), or with the torch engine under ``"auto"`` (engine, reason).

    Raises:
        ConfigError: a setting is out of its range or not for the engine.
        UnsupportedModelError: the architecture, or the width of its heads, is not for the engine.
        RiverFileError: the river was made from other weights.
        RiverError: the native engine is named and was not built.
    """
    config = config or EngineConfig()
    if config.engine == "cpu":
        check_built()
    check_weights(model)
    name, reason = choose_engine(model, config)
    if name == "torch":
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        return TorchEngine(
            attach_river(model, river, policy=ExitPolicy.never()), config.kv_bits
        ), reason
    engine = CpuEngine(
        model,
        river,
        threads=config.threads,
        backbone_bits=config.backbone_bits,
        lm_head_bits=config.lm_head_bits,
        kv_bits=config.kv_bits,
        free_model=True,
    )
    return engine, None
