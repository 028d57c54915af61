"""River-LLM: token-level early exit with a quantised exit river that writes the same KV cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from river_llm.config import DraftConfig, RiverConfig, SamplingConfig
from river_llm.errors import (
    ConfigError,
    ContextFullError,
    DataError,
    InterruptedRunError,
    MissingExtraError,
    ModelLoadError,
    PromptCacheError,
    RiverError,
    RiverFileError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from river_llm.conversation import Conversation
    from river_llm.generate import GenerationResponse, GenerationResult, LosslessStatistics
    from river_llm.lm import RiverLM
    from river_llm.river.attach import AttachedRiver, attach_river, detach_river
    from river_llm.river.policy import ExitPolicy
    from river_llm.river.river import River

__version__ = "0.3.0"

__all__ = [
    "AttachedRiver",
    "ConfigError",
    "ContextFullError",
    "Conversation",
    "DataError",
    "DraftConfig",
    "ExitPolicy",
    "GenerationResponse",
    "GenerationResult",
    "InterruptedRunError",
    "LosslessStatistics",
    "MissingExtraError",
    "ModelLoadError",
    "PromptCacheError",
    "River",
    "RiverConfig",
    "RiverError",
    "RiverFileError",
    "RiverLM",
    "SamplingConfig",
    "UnsupportedModelError",
    "attach_river",
    "detach_river",
]

_HOME = {
    "AttachedRiver": "river.attach",
    "Conversation": "conversation",
    "ExitPolicy": "river.policy",
    "GenerationResponse": "generate",
    "GenerationResult": "generate",
    "LosslessStatistics": "generate",
    "River": "river.river",
    "RiverLM": "lm",
    "attach_river": "river.attach",
    "detach_river": "river.attach",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: PyTorch takes seconds, `--help` needs none."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
