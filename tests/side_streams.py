"""Side streams without a device: they keep to the events, and see whether the events suffice."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

COMPUTATION, SIDE = 0, 1
Clock = list[int]  # how far each of the two streams has got, as far as is known


@dataclass
class Event:
    clock: Clock
    block: Tensor | None = None  # that was copied into


@dataclass
class SideStream:
    """Copies happen as late as the events allow (`lazy`), or as early.

    Each access to a block of the device has a time on its stream. One that comes after another
    must know of it, through events; or else a device might swap them.

    Attributes:
        blocks: of the device that were asked for.
    """

    lazy: bool = False
    seconds_waited: float = 0.0
    blocks: list[Tensor] = field(default_factory=list)
    _clocks: list[Clock] = field(default_factory=lambda: [[0, 0], [0, 0]])  # of each stream
    _queue: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    _accesses: dict[int, list[tuple[int, int, bool]]] = field(default_factory=dict)
    _in_use: list[Tensor] = field(default_factory=list)

    def host_block(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8)

    def device_block(self, num_bytes: int) -> Tensor:
        block = torch.full((num_bytes,), 255, dtype=torch.uint8)  # NaN in every floating dtype
        self.blocks.append(block)
        self._accesses[id(block)] = []
        # what had this memory before may still be computed with
        self._access(COMPUTATION, block, writes=True)
        return block

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        self._learn(SIDE, after)
        self._access(SIDE, target, writes=True)
        self._queue.append((target, source))
        if not self.lazy:
            self._run_to(target)
        return Event(self._tick(SIDE), target)

    def mark(self) -> Event:
        for block in self._in_use:
            self._access(COMPUTATION, block, writes=False)
        self._in_use = [block for block in self._in_use if _has_views(block)]
        return Event(self._tick(COMPUTATION))

    def wait(self, event: Event) -> None:
        assert event.block is not None
        self._run_to(event.block)
        self._learn(COMPUTATION, event)
        self._access(COMPUTATION, event.block, writes=False)
        self._in_use.append(event.block)

    def _run_to(self, block: Tensor) -> None:
        while any(target is block for target, _ in self._queue):
            target, source = self._queue.pop(0)
            target.copy_(source)

    def _tick(self, stream: int) -> Clock:
        self._clocks[stream][stream] += 1
        return list(self._clocks[stream])

    def _learn(self, stream: int, event: Event) -> None:
        self._clocks[stream] = list(map(max, self._clocks[stream], event.clock))

    def _access(self, stream: int, block: Tensor, writes: bool) -> None:
        accesses = self._accesses[id(block)]
        for other, time, wrote in accesses:
            ordered = other == stream or time <= self._clocks[stream][other]
            assert ordered or not (writes or wrote), "a block is overwritten while it is in use"
        accesses.append((stream, self._tick(stream)[stream], writes))


def _has_views(block: Tensor) -> bool:
    """Whether somebody holds a tensor in the block's memory, and may compute with it."""
    storage = block.untyped_storage()
    return int(torch._C._storage_Use_Count(storage._cdata)) > 2  # the block's and this one
