"""The memory's read bandwidth: what a decode step can't be faster than."""

from __future__ import annotations

import time
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = 1 << 29  # more than the caches that a core reaches


def read_bandwidth(threads: int, device: torch.device | None = None) -> float:
    """Bytes per second that a device's memory gives, or that `threads` threads of the CPU read
    together: by the native core, or where it isn't built by PyTorch's threads."""
    native = _native_core()
    if native is not None and (device is None or device.type == "cpu"):
        return float(native.read_bandwidth(BUFFER_BYTES, threads))
    buffer = _buffer(str(device or "cpu"))
    float(buffer[:1].sum())  # the device has come to the end of what it did
    start = time.perf_counter()
    float(buffer.sum())
    return buffer.nbytes / (time.perf_counter() - start)


@lru_cache
def _native_core() -> Any:
    try:
        return import_module("river_llm._core")
    except ImportError:  # installed without a compiler
        return None


@lru_cache(maxsize=1)
def _buffer(device: str) -> Tensor:
    return torch.ones(BUFFER_BYTES // 4, device=device)
