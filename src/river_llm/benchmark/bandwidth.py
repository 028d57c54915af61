"""The memory's read bandwidth: what a decode step can't be faster than."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_SMALLEST_BUFFER = 256 << 20
_LARGEST_BUFFER = 2 << 30
_CACHE_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

ReadBandwidth = Callable[[int], float]  # threads -> bytes per second


def read_bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together from a buffer of `buffer_bytes`.

    The native core reads where it was built, else NumPy sums.
    """
    native = _native_core()
    if native is not None:
        return float(native.read_bandwidth(buffer_bytes(), threads))
    buffer = _buffer()
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(buffer, threads)
        list(pool.map(_touch, [part[:1] for part in parts]))  # the threads start
        start = time.perf_counter()
        list(pool.map(_touch, parts))  # NumPy lets go of the interpreter meanwhile
        return buffer.nbytes / (time.perf_counter() - start)


def bandwidth_source() -> str:
    """What measures it: ``native`` or ``numpy``."""
    return "numpy" if _native_core() is None else "native"


@lru_cache
def last_level_cache_bytes() -> int | None:
    """Size of the processor's largest cache; None where the system doesn't tell.

    On a rented machine it may be shared with others, and much less be had.
    """
    sizes = []
    for file in _CACHE_FOLDER.glob("index*/size"):
        text = file.read_text().strip()
        if text and text[-1] in _UNITS:
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
    return max(sizes, default=None)


@lru_cache
def buffer_bytes() -> int:
    """Twice the last level cache, within reason: at least 256 MiB, at most 2 GiB or an eighth of
    the memory."""
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on Windows
        memory = 8 << 30
    most = max(_SMALLEST_BUFFER, min(_LARGEST_BUFFER, memory // 8))
    return min(max(2 * (last_level_cache_bytes() or 0), _SMALLEST_BUFFER), most)


@lru_cache
def _native_core() -> Any:
    try:
        return import_module("river_llm._core")
    except ImportError:  # installed without a compiler
        return None


@lru_cache(maxsize=1)
def _buffer() -> NDArray[np.int64]:
    return np.ones(buffer_bytes() // 8, dtype=np.int64)


def _touch(part: NDArray[np.int64]) -> int:
    return int(np.bitwise_or.reduce(part))
