"""How much memory the process holds, by the system's own account."""

from __future__ import annotations

import sys

import torch


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory held so far: on CUDA by the device's allocator, else by the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
