"""Evicted layers in the host's memory, for models on a device with streams of its own.

A layer is copied on a side stream while the device computes another one. The order between the two
streams is in events, never in the host's own: the host runs ahead of the device.

    side stream     copy 5 into A ─┐ copy 6 into B ─┐   ┌ copy 7 into A ...
                             ready v          ready v   │ done
    computation     layer 4   ...   layer 5 (A) ────────┴ layer 6 (B) ...
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from river_llm.offloading.layer_store import Layout

Event = Any


class SideStream(Protocol):
    """What a store asks of a device.

    Attributes:
        seconds_waited: by the computation, in `wait`.
    """

    @property
    def seconds_waited(self) -> float: ...

    def host_block(self, num_bytes: int) -> Tensor:
        """Memory of the host that the device copies from by itself, uint8 `[num_bytes]`.

        Raises:
            RiverError: there is none left.
        """
        ...

    def device_block(self, num_bytes: int) -> Tensor:
        """Memory of the device, uint8 `[num_bytes]`. The computation so far may still be using it;
        once it is let go of, nobody else gets it before the side stream is done with it."""
        ...

    def copy(self, target: Tensor, source: Tensor, after: Event) -> Event:
        """Copy to the device on the side stream, after an event; the event that it is done."""
        ...

    def mark(self) -> Event:
        """The event that all is done that the computation was asked for so far."""
        ...

    def wait(self, event: Event) -> None:
        """Let the computation go on only after an event of the side stream."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class _Slot:
    """Memory of the device for one layer at a time.

    Attributes:
        unused: the event after which nothing is computed with what it holds.
    """

    block: Tensor
    unused: Event


class HostStore:
    """Layers in the host's memory. A pass takes turns with as few blocks of the device as it has
    layers under way at once, which are two."""

    def __init__(self, stream: SideStream) -> None:
        self._stream = stream
        self._layers: dict[int, tuple[Layout, Tensor]] = {}
        self._slots: list[_Slot] = []  # that no layer is in

    @property
    def seconds_waited(self) -> float:
        return self._stream.seconds_waited

    def __contains__(self, index: int) -> bool:
        return index in self._layers

    def put(self, index: int, weights: Sequence[Tensor]) -> None:
        layout = Layout.of(weights)
        block = self._stream.host_block(layout.num_bytes)
        layout.write(weights, block)
        self._layers[index] = layout, block

    def read(self, index: int) -> list[Tensor]:
        layout, host_block = self._layers[index]
        block = self._stream.device_block(layout.num_bytes)
        block.copy_(host_block)
        return layout.views(block)

    def fetch(self, index: int) -> _Copying:
        layout, host_block = self._layers[index]
        slot = self._slot(layout.num_bytes)
        ready = self._stream.copy(slot.block, host_block, after=slot.unused)
        return _Copying(self, layout, slot.block, ready)

    def end_pass(self) -> None:
        self._slots.clear()

    def _slot(self, num_bytes: int) -> _Slot:
        for slot in self._slots:
            if len(slot.block) == num_bytes:
                self._slots.remove(slot)
                return slot
        return _Slot(self._stream.device_block(num_bytes), self._stream.mark())


class _Copying:
    """A layer that is being copied."""

    def __init__(self, store: HostStore, layout: Layout, block: Tensor, ready: Event) -> None:
        self._store = store
        self._layout = layout
        self._block = block
        self._ready = ready

    def weights(self) -> list[Tensor]:
        self._store._stream.wait(self._ready)
        return self._layout.views(self._block)

    def release(self) -> None:
        # where the layer was not waited for, the next copy into the block still comes after this
        # one: both are on the side stream
        self._store._slots.append(_Slot(self._block, self._store._stream.mark()))
