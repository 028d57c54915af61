"""From options to a model with its river, with progress on stderr."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_llm.cli.imports import import_libraries
from river_llm.cli.options import DtypeName, EngineName, WeightBits
from river_llm.config import DraftConfig, RiverConfig
from river_llm.errors import ConfigError
from river_llm.residency import OffloadConfig
from river_llm.sizes import format_bytes

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from river_llm.attachment import AttachedRiver
    from river_llm.exit_policy import ExitPolicy
    from river_llm.lm import RiverLM


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadOptions:
    """What a command is told about the model that it runs.

    Attributes:
        model: its name or path.
        river: the folder of a saved river, or how to build one.
        policy: when tokens leave the backbone; None: lossless mode.
        dtype: of the backbone.
        device: by default CUDA where there is one.
        threads: that compute on a CPU; by default all.
        trust_remote_code: run code that comes with the model.
        engine, backbone_bits, lm_head_bits, kv_bits: what computes, for `load`.
        drafts: how lossless mode drafts; None in river mode.
        offload: which backbone layers stay in memory; None: all.
    """

    model: str
    river: Path | RiverConfig
    policy: ExitPolicy | None
    dtype: DtypeName
    device: str | None
    threads: int | None
    trust_remote_code: bool
    engine: EngineName = EngineName.auto
    backbone_bits: WeightBits = WeightBits.sixteen
    lm_head_bits: WeightBits = WeightBits.sixteen
    kv_bits: WeightBits = WeightBits.sixteen
    drafts: DraftConfig | None = None
    offload: OffloadConfig | None = None


def load(options: LoadOptions) -> RiverLM:
    """The model with its river and the engine that runs them.

    Raises:
        RiverError: see `RiverLM.from_pretrained`.
    """
    from river_llm.cli.progress import LoadingProgress

    with LoadingProgress(f"loading {options.model}") as progress:
        prepare_torch(options.threads)
        from river_llm.generate import check_drafts
        from river_llm.lm import RiverLM

        lm = RiverLM.from_pretrained(
            options.model,
            options.river,
            options.policy,
            torch_dtype(options.dtype),
            device=check_device(options.device),
            engine=options.engine.value,
            threads=options.threads,
            backbone_bits=int(options.backbone_bits.value),
            lm_head_bits=int(options.lm_head_bits.value),
            kv_bits=int(options.kv_bits.value),
            offload=options.offload,
            trust_remote_code=options.trust_remote_code,
            progress=progress.layers_built,
        )
    if options.drafts is not None:
        check_drafts(lm.engine, options.drafts)
    notes = []
    if lm.residency is not None:
        weights = format_bytes(lm.residency.resident_bytes)
        notes.append(f"offloading: {lm.residency.describe()}, {weights} of weights")
    if lm.fallback_reason is not None:
        notes.append(f"PyTorch computes: {lm.fallback_reason}")
    widths = {
        "backbone": options.backbone_bits,
        "LM head": options.lm_head_bits,
        "KV cache": options.kv_bits,
    }
    for name, bits in widths.items():
        if bits is WeightBits.eight:
            notes.append(f"the {name} is in 8 bits: the answers are not exactly the model's")
    is_rounded = lm.engine.name == "torch" and options.dtype is not DtypeName.float32
    if options.drafts is not None and is_rounded:
        notes.append(
            f"PyTorch in {options.dtype.value} rounds a pass over several tokens otherwise than "
            "single steps: where two tokens are nearly equal, the other one may be taken"
        )
    for note in notes:
        print(f"river-llm: {note}", file=sys.stderr)
    return lm


def describe_loaded(options: LoadOptions, lm: RiverLM) -> dict[str, Any]:
    """What decides over the tokens beside prompt and policy, as JSON values."""
    from river_llm import __version__

    has_directory = lm.river_config is not None and isinstance(options.river, Path)
    return {
        "version": __version__,
        "model": options.model,
        "engine": lm.engine.name,
        "device": str(lm.engine.device),
        "dtype": options.dtype.value,
        "backbone_bits": int(options.backbone_bits.value),
        "lm_head_bits": int(options.lm_head_bits.value),
        "kv_bits": int(options.kv_bits.value),
        "river": None if lm.river_config is None else lm.river_config.to_dict(),
        "river_directory": str(options.river) if has_directory else None,
        "drafts": None if options.drafts is None else asdict(options.drafts),
    }


def load_attached(options: LoadOptions) -> tuple[AttachedRiver, PreTrainedTokenizerBase]:
    """The model of `transformers` with its river attached, and its tokeniser.

    Raises:
        RiverError: see `load_with_river`.
    """
    from river_llm.cli.progress import LoadingProgress

    with LoadingProgress(f"loading {options.model}") as progress:
        prepare_torch(options.threads)
        from river_llm.pretrained import load_with_river

        return load_with_river(
            options.model,
            options.river,
            options.policy,
            torch_dtype(options.dtype),
            device=check_device(options.device),
            trust_remote_code=options.trust_remote_code,
            progress=progress.layers_built,
        )


def prepare_torch(threads: int | None) -> None:
    """Set the number of threads, and keep the libraries' own bars and notes off the terminal.

    Raises:
        ConfigError: no engine takes so many threads.
    """
    import_libraries()
    import huggingface_hub
    import torch
    import transformers

    from river_llm.engines import check_threads

    check_threads(threads)
    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if threads is not None:
        torch.set_num_threads(threads)


def torch_dtype(name: DtypeName) -> torch.dtype:
    """PyTorch's dtype of that name."""
    import torch

    dtype: torch.dtype = getattr(torch, name.value)
    return dtype


def check_device(device: str | None) -> Any:
    """The device of that name, seen to be there.

    Raises:
        ConfigError: there is none.
    """
    import torch

    if device is None:
        return None
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"there is no device {device!r} here; try --device cpu") from error
