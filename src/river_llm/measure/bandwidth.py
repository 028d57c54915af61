"""The memory's read bandwidth: what a decode step can't be faster than."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from torch import Tensor

from river_llm.engines.native_core import is_built

BUFFER_BYTES = 1 << 29  # more than the caches that a core reaches


def read_bandwidth(threads: int, device: torch.device | None = None) -> float:
    """Bytes per second that a device's memory gives, or that `threads` threads of the CPU read
    together: by the native core, or where it isn't built by PyTorch's threads."""
    if is_built() and (device is None or device.type == "cpu"):
        from river_llm import _core

        return float(_core.read_bandwidth(BUFFER_BYTES, threads))
    buffer = _buffer(str(device or "cpu"))
    float(buffer[:1].sum())  # the device has come to the end of what it did
    start = time.perf_counter()
    float(buffer.sum())
    return buffer.nbytes / (time.perf_counter() - start)


@lru_cache(maxsize=1)
def _buffer(device: str) -> Tensor:
    return torch.ones(BUFFER_BYTES // 4, device=device)
