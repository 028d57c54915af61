"""What `RiverLM.from_pretrained` loads: model, tokeniser, river, and the engine that runs them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from river_llm.attachment import AttachedRiver, attach_river, check_is_river
from river_llm.cache import CachedFolder
from river_llm.config import RiverConfig
from river_llm.engines import (
    CpuEngine,
    Engine,
    EngineChoice,
    check_dtype,
    check_engine_options,
    check_threads,
    choose_engine,
    make_engine,
)
from river_llm.engines.step import Offloading
from river_llm.errors import ConfigError
from river_llm.exit_policy import ExitPolicy, check_is_policy
from river_llm.loading import load_backbone
from river_llm.packed_copy import (
    PackedModel,
    keep_packed,
    offload_packed,
    packed_folder,
    read_packed,
)
from river_llm.residency import OffloadConfig, ResidencyPlan
from river_llm.river import Progress, River
from river_llm.stop_tokens import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Pretrained:
    """The parts of a `RiverLM`; see there."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    river_config: RiverConfig
    stop_tokens: frozenset[int]
    fallback_reason: str | None = None
    residency: ResidencyPlan | None = None


def load_pretrained(
    name_or_path: str | Path,
    river: str | Path | River | RiverConfig | None,
    policy: ExitPolicy | None,
    dtype: torch.dtype,
    *,
    device: torch.device | str | None = None,
    engine: EngineChoice = "auto",
    threads: int | None = None,
    backbone_bits: int = 16,
    lm_head_bits: int = 16,
    kv_bits: int = 16,
    offload: OffloadConfig | str | int | None = None,
    no_miss: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Pretrained:
    """Load all of it; errors, and the arguments before these, as of `RiverLM.from_pretrained`.

    Args:
        device: by default CUDA where there is one, else the CPU.
        engine: ``"cpu"``, the native one, ``"torch"`` or ``"auto"``, see `make_engine`.
        threads: that compute on a CPU, 1 to 1024; by default as many as the process may use.
        backbone_bits: 16, or 8 (native engine): the backbone's layers in 8-bit codes too.
        lm_head_bits: 16, or 8 (native engine): faster, and not exactly the model any more.
        kv_bits: 16, which stands for `dtype`, or 8: a KV cache of about half the bytes, and not
            exactly the model any more.
        offload: which backbone layers stay in memory: an `OffloadConfig`, or ``"auto"``, a number
            of layers or a size such as ``"2GiB"``, see there; by default all.
        no_miss: no token goes deeper than the layers that stay.
        progress: called while the river is built with (layers done, layers in all).

    What the native engine has packed is kept in the cache, as large as the model and its river, for
    a quick start the next time.
    """
    check_is_river(river)
    if policy is not None:
        check_is_policy(policy)
    check_dtype(dtype, engine)
    check_threads(threads)
    check_engine_options(engine, backbone_bits, lm_head_bits, kv_bits)
    offload = OffloadConfig.of(offload, no_miss)
    bits = {"backbone_bits": backbone_bits, "lm_head_bits": lm_head_bits}
    policy = policy or ExitPolicy.never()  # of lossless mode
    device = device or _default_device()
    find_packed = None
    may_be_packed = engine != "torch" and dtype is torch.bfloat16 and not trust_remote_code
    if may_be_packed and torch.device(device).type == "cpu" and not isinstance(river, River):
        find_packed = partial(packed_folder, name_or_path, river, **bits)
    folder = find_packed() if find_packed else None
    packed = read_packed(folder, policy, threads, offload, kv_bits) if folder else None
    if packed is not None:
        return Pretrained(
            packed.engine,
            packed.tokenizer,
            packed.river_config,
            packed.stop_tokens,
            residency=packed.residency,
        )
    check = partial(choose_engine, choice=engine, kv_bits=kv_bits, **bits)
    model, tokenizer, made = _load(
        name_or_path, river, dtype, device, trust_remote_code, progress, check
    )
    ends = stop_tokens(model, tokenizer)
    chosen, reason = make_engine(model, made, engine, threads=threads, kv_bits=kv_bits, **bits)
    if folder is not None and find_packed and isinstance(chosen, CpuEngine):
        packed = PackedModel(chosen, tokenizer, made.config, ends)
        if find_packed() == folder:  # else files were changed while they were read
            keep_packed(folder, packed)
    residency = _offload(chosen, folder, offload, policy) if offload is not None else None
    return Pretrained(chosen, tokenizer, made.config, ends, reason, residency)


def load_with_river(
    name_or_path: str | Path,
    river: str | Path | River | RiverConfig | None = None,
    policy: ExitPolicy | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> tuple[AttachedRiver, PreTrainedTokenizerBase]:
    """The model of `transformers` with its river attached, and its tokeniser; arguments and errors
    as of `RiverLM.from_pretrained`."""
    model, tokenizer, made = _load(name_or_path, river, dtype, device, trust_remote_code, progress)
    return attach_river(model, made, policy=policy), tokenizer


def _offload(
    engine: Engine, folder: CachedFolder | None, config: OffloadConfig, policy: ExitPolicy
) -> ResidencyPlan:
    """Evict layers of an engine that was just made."""
    if isinstance(engine, CpuEngine):
        if folder is None:
            raise ConfigError(
                "the native engine offloads to the packed copy that it keeps in the cache, and "
                "there is none: RIVER_LLM_CACHE=off, a River object, or trust_remote_code"
            )
        return offload_packed(engine, folder, config, policy)
    assert isinstance(engine, Offloading)
    plan = ResidencyPlan(config, engine.layer_bytes, engine.rest_bytes, policy)
    engine.keep_layers(plan.resident)
    return plan


def _load(
    name_or_path: str | Path,
    river: str | Path | River | RiverConfig | None,
    dtype: torch.dtype,
    device: torch.device | str | None,
    trust_remote_code: bool,
    progress: Progress | None,
    check: Callable[[PreTrainedModel], object] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, River]:
    """The model, its tokeniser and its river; `check` may refuse the model before the river is
    built, which takes minutes where the model is large."""
    if isinstance(river, str | Path):
        river = River.load(river)
    device = device or _default_device()
    model, tokenizer = load_backbone(name_or_path, dtype, device, trust_remote_code)
    if check is not None:
        check(model)
    if not isinstance(river, River):
        river = River.build(model, river, progress)
    return model, tokenizer, river


def _default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
