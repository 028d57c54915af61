"""What `RiverLM.from_pretrained` loads: model, tokenizer, river, and the engine that runs them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from river_llm.config import EngineConfig, RiverConfig
from river_llm.engines import CpuEngine, Engine, check_threads, choose_engine, make_engine
from river_llm.engines.native_core import check_built
from river_llm.engines.step import Offloading
from river_llm.errors import ConfigError
from river_llm.load.calibration_text import written_text
from river_llm.load.model import load_backbone
from river_llm.load.repacked_weights import (
    Pretrained,
    keep_packed,
    packed_folder,
    read_packed,
    weights_file,
)
from river_llm.river.attach import AttachedRiver, attach_river, check_is_river
from river_llm.river.policy import ExitPolicy, check_is_policy
from river_llm.river.residency import OffloadConfig, ResidencyPlan
from river_llm.river.river import Progress, River
from river_llm.store import CachedFolder
from river_llm.text.stop_tokens import stop_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RiverChoice = str | Path | River | RiverConfig | None


def load_pretrained(
    name_or_path: str | Path,
    river: RiverChoice,
    policy: ExitPolicy | None,
    config: EngineConfig,
    progress: Progress | None = None,
) -> Pretrained:
    """Load all of it; arguments and errors as of `RiverLM.from_pretrained`."""
    check_is_river(river)
    if policy is not None:
        check_is_policy(policy)
    check_threads(config.threads)
    if config.engine == "cpu":
        check_built()
    offload = OffloadConfig.of(config.offload, config.no_miss)
    policy = policy or ExitPolicy.never()  # of lossless mode
    find_packed = None
    if _may_be_packed(config) and not isinstance(river, River):
        bits = {"backbone_bits": config.backbone_bits, "lm_head_bits": config.lm_head_bits}
        find_packed = partial(packed_folder, name_or_path, river, **bits)
    folder = find_packed() if find_packed else None
    if folder is not None:
        packed = read_packed(folder, policy, config.threads, offload, config.kv_bits)
        if packed is not None:
            return packed
    check = partial(choose_engine, config=config)
    model, tokenizer, made = _load(name_or_path, river, config, progress, check)
    ends = stop_tokens(model, tokenizer)
    engine, reason = make_engine(model, made, config)
    # else files were changed while they were read
    is_same = find_packed is not None and find_packed() == folder
    if folder is not None and isinstance(engine, CpuEngine) and is_same:
        keep_packed(folder, engine, tokenizer, made.config, ends)
    residency = _offload(engine, folder, offload, policy) if offload is not None else None
    return Pretrained(engine, tokenizer, made.config, ends, reason, residency)


def load_with_river(
    name_or_path: str | Path,
    river: RiverChoice = None,
    policy: ExitPolicy | None = None,
    config: EngineConfig | None = None,
    progress: Progress | None = None,
) -> tuple[AttachedRiver, PreTrainedTokenizerBase]:
    """The model of `transformers` with its river attached, and its tokenizer; arguments and errors
    as of `RiverLM.from_pretrained`."""
    model, tokenizer, made = _load(name_or_path, river, config or EngineConfig(), progress)
    return attach_river(model, made, policy=policy), tokenizer


def _may_be_packed(config: EngineConfig) -> bool:
    """Whether the native engine may serve, with weights that it has packed before."""
    is_native = config.engine != "torch" and config.dtype == "bfloat16"
    return is_native and not config.trust_remote_code and _device(config).type == "cpu"


def _offload(
    engine: Engine, folder: CachedFolder | None, config: OffloadConfig, policy: ExitPolicy
) -> ResidencyPlan:
    """Evict layers of an engine that was just made."""
    assert isinstance(engine, Offloading)
    plan = ResidencyPlan(config, engine.layer_bytes, engine.rest_bytes, policy)
    if isinstance(engine, CpuEngine):
        if folder is None:
            raise ConfigError(
                "the native engine offloads to the repacked-weight cache, and "
                "there is none: RIVER_LLM_CACHE=off, a River object, or trust_remote_code"
            )
        engine.offload_to(weights_file(folder))
    engine.keep_layers(plan.resident)
    return plan


def _load(
    name_or_path: str | Path,
    river: RiverChoice,
    config: EngineConfig,
    progress: Progress | None,
    check: Callable[[PreTrainedModel], object] | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, River]:
    """The model, its tokenizer and its river; `check` may refuse the model before the river is
    built, which takes minutes where the model is large."""
    if isinstance(river, str | Path):
        river = River.load(river)
    model, tokenizer = load_backbone(
        name_or_path, config.torch_dtype, _device(config), config.trust_remote_code
    )
    if check is not None:
        check(model)
    if not isinstance(river, River):
        needs_text = river is not None and river.needs_text
        text = written_text(model, tokenizer) if needs_text else None
        river = River.build(model, river, progress, text)
    return model, tokenizer, river


def _device(config: EngineConfig) -> torch.device:
    return torch.device(config.device or ("cuda" if torch.cuda.is_available() else "cpu"))
