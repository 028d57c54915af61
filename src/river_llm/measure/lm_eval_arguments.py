"""The model that lm-eval's `--model_args` name."""

from __future__ import annotations

from typing import Any

from river_llm.config import (
    DEFAULT_MODEL,
    EngineConfig,
    PolicyConfig,
    RiverConfig,
)
from river_llm.errors import ConfigError
from river_llm.lm import RiverLM
from river_llm.settings import split_settings


def load_model(pretrained: str = DEFAULT_MODEL, river: str | None = None, **given: Any) -> RiverLM:
    """Load a model with its river.

    Args:
        pretrained: a model directory, a GGUF file, a Hub id, or ``smollm2``.
        river: the folder of one that was saved.
        **given: fields of `RiverConfig`, `PolicyConfig` and `EngineConfig`; None is what wasn't
            given. Without a policy answers are lossless, and texts are scored by the backbone.

    Raises:
        ConfigError: an argument is unknown, out of its range or contradicts another.
        RiverError: see `RiverLM.from_pretrained`.
    """
    given = {name: value for name, value in given.items() if value is not None}
    try:
        config, policy, engine = split_settings(given, RiverConfig, PolicyConfig, EngineConfig)
    except ConfigError as error:
        raise ConfigError(f"model_args: {error}") from error
    if river is not None and config != RiverConfig():
        raise ConfigError("model_args: a river brings its own bits, group_size and quantizer")
    return RiverLM.from_pretrained(
        pretrained, river or config, policy.exit_policy(), **engine.to_dict()
    )
