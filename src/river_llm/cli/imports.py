"""The start of the program, most of which is the import of PyTorch and transformers."""

from __future__ import annotations

import gc
import sys


def import_libraries() -> None:
    """Import what every command that runs a model needs, without looking for garbage meanwhile.

    The modules are a million objects that stay to the end and hardly any garbage. Python would
    look through them again and again while they come, and once more when it ends, which together
    takes a quarter as long as the imports themselves. Does nothing the second time.
    """
    if "river_llm.river_lm" in sys.modules:
        return
    gc.disable()
    try:
        import river_llm.river_lm  # noqa: F401
    finally:
        gc.freeze()
        gc.enable()
