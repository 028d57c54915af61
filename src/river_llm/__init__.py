"""River-LLM: token-level early exit with a quantised exit river that writes the same KV cache."""

from river_llm.attachment import AttachedRiver, attach_river, detach_river
from river_llm.config import RiverConfig
from river_llm.errors import (
    ConfigError,
    ContextFullError,
    ModelLoadError,
    RiverError,
    RiverFileError,
    UnsupportedModelError,
)
from river_llm.exit_policy import ExitPolicy
from river_llm.generation import GenerationResponse, GenerationResult
from river_llm.river import River
from river_llm.river_lm import Conversation, RiverLM
from river_llm.sampling import SamplingConfig

__version__ = "0.1.0"

__all__ = [
    "AttachedRiver",
    "ConfigError",
    "ContextFullError",
    "Conversation",
    "ExitPolicy",
    "GenerationResponse",
    "GenerationResult",
    "ModelLoadError",
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
