"""How much memory the process holds, by the system's own account, and how it is given back."""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

_HUGE_PAGE = 2**21  # bytes


def peak_memory_bytes(device: torch.device | None = None) -> int:
    """The most memory held so far: on CUDA by the device's allocator, else by the process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # what getrusage says in a process that was just begun may be its parent's
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """The memory that the process holds now, its mapped files among it; 0 where the system doesn't
    say (it does on Linux)."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def own_block(num_bytes: int) -> Tensor:
    """Memory of the CPU, uint8 `[num_bytes]`, that the system gets back as soon as it is let go of;
    what an allocator is given back it may keep. In huge pages where there are any: to fill fresh
    memory in small ones takes longer than to read a file from the system's cache.

    Raises:
        MemoryError: there is none left.
    """
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    try:
        memory = mmap.mmap(-1, num_bytes + _HUGE_PAGE, **private)
    except OSError as error:
        raise MemoryError(f"no {num_bytes / 1e9:.2f} GB of memory left ({error})") from error
    block = torch.frombuffer(memory, dtype=torch.uint8)
    start = -block.data_ptr() % _HUGE_PAGE
    whole_pages = num_bytes // _HUGE_PAGE * _HUGE_PAGE
    if whole_pages and hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, start, whole_pages)
    return block[start : start + num_bytes]


def give_back_freed() -> None:
    """Let the C library's allocator return to the system what it keeps of freed memory."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc alone
        if trim is not None:
            trim(0)
