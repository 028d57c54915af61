"""The start of the program, most of which is the import of PyTorch and transformers."""

from __future__ import annotations

import gc
import os
import sys

_SPIN_COUNT = "1000"  # looks at a barrier; libgomp's own 300,000 take milliseconds
_OPENMP_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def let_waiting_threads_sleep() -> None:
    """Have PyTorch's threads give their core away soon where they wait for each other, unless the
    user's environment says how they wait. Beside other processes that compute, a thread that spins
    takes the core that the awaited one needs; docs/performance.md has figures.

    For libgomp, which reads its variables when PyTorch is imported.
    """
    if not any(name in os.environ for name in _OPENMP_VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = _SPIN_COUNT


def import_libraries() -> None:
    """Import what every command that runs a model needs, without looking for garbage meanwhile.

    The modules are a million objects that stay to the end and hardly any garbage. Python would
    look through them again and again while they come, and once more when it ends, which together
    takes a quarter as long as the imports themselves. Does nothing the second time.
    """
    if "river_llm.lm" in sys.modules:
        return
    gc.disable()
    try:
        import river_llm.lm  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
