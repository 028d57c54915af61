"""Packages that only evaluation needs: `pip install 'river-llm[eval]'`."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from river_llm.errors import MissingExtraError


def import_extra(module: str, purpose: str) -> Any:
    """A module of an optional package.

    Args:
        purpose: what needs it, for the message.

    Raises:
        MissingExtraError: it, or a package that it needs, is not installed.
    """
    try:
        return import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        detail = "" if error.name in (None, module, module.partition(".")[0]) else f" ({error})"
        raise MissingExtraError(
            f"{purpose} needs the package {package}{detail}; install it with "
            "pip install 'river-llm[eval]'"
        ) from error
