"""How a step is computed. Generation knows engines only through `Engine` and its protocols."""

from river_llm.engines.choice import check_threads, choose_engine, make_engine
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.drafting import Draft, DraftRule
from river_llm.engines.native_core import weight_layout
from river_llm.engines.step import Engine, Step, StepResult
from river_llm.engines.torch import TorchEngine

__all__ = [
    "CpuEngine",
    "Draft",
    "DraftRule",
    "Engine",
    "Step",
    "StepResult",
    "TorchEngine",
    "check_threads",
    "choose_engine",
    "make_engine",
    "weight_layout",
]
