"""How a step is computed. Generation and lossless mode know engines only through `Engine`."""

from river_llm.engines.choice import (
    EngineChoice,
    check_dtype,
    check_engine_options,
    check_threads,
    choose_engine,
    make_engine,
)
from river_llm.engines.cpu_engine import CpuEngine
from river_llm.engines.drafting import Draft, DraftRule
from river_llm.engines.step import Engine, StepResult
from river_llm.engines.native_core import weight_layout
from river_llm.engines.torch_engine import TorchEngine

__all__ = [
    "CpuEngine",
    "Draft",
    "DraftRule",
    "Engine",
    "EngineChoice",
    "StepResult",
    "TorchEngine",
    "check_dtype",
    "check_engine_options",
    "check_threads",
    "choose_engine",
    "make_engine",
    "weight_layout",
]
