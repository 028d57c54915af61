"""From settings to a model with its river, with progress on stderr."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_llm.cli.imports import import_libraries
from river_llm.cli.usage import usage_error
from river_llm.config import DraftConfig, EngineConfig, PolicyConfig, RiverConfig
from river_llm.errors import ConfigError
from river_llm.sizes import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from river_llm.lm import RiverLM
    from river_llm.river.attach import AttachedRiver
    from river_llm.river.tuned import NamedPolicy


def saved_or_new(river: Path | None, config: RiverConfig) -> Path | RiverConfig:
    """The folder of a saved river, or how to build one.

    Raises:
        typer.Exit: both are given.
    """
    if river is None:
        return config
    if config != RiverConfig():
        raise usage_error("--river brings its own --bits, --group-size and --quantizer")
    return river


def check_mode(policy: PolicyConfig, engine: EngineConfig, drafts: DraftConfig) -> None:
    """Validate that the settings are for the mode, lossless where there is no policy.

    Raises:
        typer.Exit: some are for the other one.
    """
    if policy.is_lossless and engine.no_miss:
        raise usage_error("lossless mode verifies with the whole backbone: leave out --no-miss")
    if policy.second_look is not None and engine.no_miss:
        raise usage_error("a second look runs the whole backbone: leave out --no-miss")
    if not policy.is_lossless and drafts != DraftConfig():
        raise usage_error("the draft options go with lossless mode: leave the exit policy out")


def load(
    model: str,
    river: Path | RiverConfig,
    policy: NamedPolicy,
    engine: EngineConfig,
    drafts: DraftConfig | None = None,
) -> tuple[RiverLM, EngineConfig]:
    """The model with its river and the engine that runs them, and its settings, those of a tuned
    river included; notes go to stderr.

    Raises:
        RiverError: see `RiverLM.from_pretrained`.
    """
    from river_llm.cli.progress import LoadingProgress

    with LoadingProgress(f"loading {model}") as progress:
        prepare_torch(engine)
        from river_llm.lm import RiverLM
        from river_llm.river.tuned import chosen_policy

        chosen, engine = chosen_policy(policy, river, engine)
        lm = RiverLM.from_pretrained(
            model, river, chosen, progress=progress.layers_built, **engine.to_dict()
        )
    if drafts is not None and lm.policy is None:
        from river_llm.generate import check_drafts

        check_drafts(lm.engine, drafts)
    for note in _notes(lm, engine):
        print(f"river-llm: {note}", file=sys.stderr)
    return lm, engine


def _notes(lm: RiverLM, config: EngineConfig) -> list[str]:
    """What the user should know of the model as it was loaded."""
    notes = []
    if lm.residency is not None:
        weights = format_bytes(lm.residency.resident_bytes)
        notes.append(f"offloading: {lm.residency.describe()}, {weights} of weights")
    if lm.fallback_reason is not None:
        notes.append(f"PyTorch computes: {lm.fallback_reason}")
    widths = {
        "backbone": config.backbone_bits,
        "LM head": config.lm_head_bits,
        "KV cache": config.kv_bits,
    }
    for name, bits in widths.items():
        if bits == 8:
            notes.append(f"the {name} is in 8 bits: the answers are not exactly the model's")
    if lm.policy is None and lm.engine.name == "torch" and config.dtype != "float32":
        notes.append(
            f"PyTorch in {config.dtype} rounds a pass over several tokens otherwise than single "
            "steps: where two tokens are nearly equal, the other one may be taken"
        )
    return notes


def load_attached(
    model: str, river: Path | RiverConfig, policy: NamedPolicy, engine: EngineConfig
) -> tuple[AttachedRiver, PreTrainedTokenizerBase]:
    """The model of `transformers` with its river attached, and its tokenizer; nothing runs twice
    there, so a second look is left out, with a note on stderr.

    Raises:
        RiverError: see `load_with_river`.
    """
    from river_llm.cli.progress import LoadingProgress

    with LoadingProgress(f"loading {model}") as progress:
        prepare_torch(engine)
        from river_llm.load.pretrained import load_with_river
        from river_llm.river.policy import ExitPolicy
        from river_llm.river.tuned import chosen_policy

        chosen, engine = chosen_policy(policy, river, engine)
        chosen = chosen or ExitPolicy.never()
        looks_again = chosen.second_look is not None
        chosen = replace(chosen, second_look=None)
        loaded = load_with_river(model, river, chosen, engine, progress.layers_built)
    if looks_again:
        print("river-llm: the policy's second look is left out here", file=sys.stderr)
    return loaded


def prepare_torch(engine: EngineConfig) -> None:
    """Set the number of threads, and keep the libraries' own bars and notes off the terminal.

    Raises:
        ConfigError: there is no such device.
    """
    import_libraries()
    import huggingface_hub
    import torch
    import transformers

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if engine.threads is not None:
        torch.set_num_threads(engine.threads)
    if engine.device is not None:
        try:
            torch.empty(0, device=engine.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(
                f"there is no device {engine.device!r} here; try --device cpu"
            ) from error


def describe_loaded(
    model: str, river: Path | RiverConfig, engine: EngineConfig, lm: RiverLM
) -> dict[str, Any]:
    """What decides over the tokens beside prompt and policy, as JSON values."""
    from river_llm import __version__

    return {
        "version": __version__,
        "model": model,
        **engine.to_dict(),
        "engine": lm.engine.name,
        "device": str(lm.engine.device),
        "river": lm.river_config.to_dict(),
        "river_directory": str(river) if isinstance(river, Path) else None,
    }
