"""Early exit as others do it: what becomes of the keys and values of the layers that a token skips.

The river fills them in with a light copy of each skipped layer (`TorchEngine`, `CpuEngine`). Here
are the strategies that it is compared with, on an engine of the same verbs.
"""

from river_llm.strategies.choice import (
    STRATEGIES,
    check_policy,
    check_strategy,
    default_policy,
    make_strategy_engine,
)
from river_llm.strategies.engine import StrategyEngine

__all__ = [
    "STRATEGIES",
    "StrategyEngine",
    "check_policy",
    "check_strategy",
    "default_policy",
    "make_strategy_engine",
]
