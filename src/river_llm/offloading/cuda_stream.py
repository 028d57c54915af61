"""The side stream of a CUDA device."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor

from river_llm.errors import RiverError

_WAITS_KEPT = 1024  # whose times need not be known yet


class CudaSideStream:
    """See `SideStream`. The computation is on whatever stream is current at each call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._seconds_waited = 0.0
        self._waits: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()  # before, after

    @property
    def seconds_waited(self) -> float:
        """Returns only when the computation has got as far as the last wait."""
        self._add_waits(but=0)
        return self._seconds_waited

    def host_block(self, num_bytes: int) -> Tensor:
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:
            raise RiverError(
                f"the host has no {num_bytes / 1e9:.2f} GB of memory left to pin for an evicted "
                "layer; keep more layers on the device"
            ) from error

    def device_block(self, num_bytes: int) -> Tensor:
        block = torch.empty(num_bytes, dtype=torch.uint8, device=self._device)
        block.record_stream(self._stream)
        return block

    def copy(self, target: Tensor, source: Tensor, after: torch.cuda.Event) -> torch.cuda.Event:
        ready = _event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target.copy_(source, non_blocking=True)
            ready.record(self._stream)
        return ready

    def mark(self) -> torch.cuda.Event:
        event = _event()
        event.record(torch.cuda.current_stream(self._device))
        return event

    def wait(self, event: torch.cuda.Event) -> None:
        computation = torch.cuda.current_stream(self._device)
        before, after = _event(timed=True), _event(timed=True)
        before.record(computation)
        computation.wait_event(event)
        after.record(computation)
        self._waits.append((before, after))
        self._add_waits(but=_WAITS_KEPT)

    def _add_waits(self, but: int) -> None:
        """Add up the times of all waits but the last so many."""
        while len(self._waits) > but:
            before, after = self._waits.popleft()
            after.synchronize()
            self._seconds_waited += before.elapsed_time(after) / 1000  # it counts milliseconds


def _event(timed: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]
