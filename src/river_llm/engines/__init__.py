"""How a step is computed. Generation and evaluation know engines only through `Engine`."""

from river_llm.engines.engine import Engine, StepResult
from river_llm.engines.torch_engine import TorchEngine

__all__ = ["Engine", "StepResult", "TorchEngine"]
