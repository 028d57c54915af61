"""Where the weights of evicted layers are kept, and how they lie there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

_ALIGNMENT = 64  # bytes, as PyTorch aligns what it allocates


class Arrival(Protocol):
    """A layer on its way back."""

    def weights(self) -> list[Tensor]:
        """The layer's weights, for what is computed from now on.

        Raises:
            RiverError: the store is damaged.
        """
        ...

    def release(self) -> None:
        """No more will be computed with the weights than what has been asked for so far."""
        ...


class LayerStore(Protocol):
    """Keeps the weights of layers outside of the memory that they are computed in.

    Attributes:
        seconds_waited: by the computation, for layers that were still on their way.
    """

    @property
    def seconds_waited(self) -> float: ...

    def __contains__(self, index: int) -> bool:
        """Whether it has layer `index`."""
        ...

    def put(self, index: int, weights: Sequence[Tensor]) -> None:
        """Keep a layer's weights, for as long as the store lives.

        Raises:
            RiverError: there is no room for them.
        """
        ...

    def read(self, index: int) -> list[Tensor]:
        """A layer's weights, in memory of their own that they stay in.

        Raises:
            RiverError: the store is damaged.
        """
        ...

    def fetch(self, index: int) -> Arrival:
        """Begin to bring a layer back for one pass. Returns at once."""
        ...

    def end_pass(self) -> None:
        """Give back the memory that passes have used."""
        ...


@dataclass(frozen=True, slots=True)
class _Place:
    start: int  # bytes
    shape: torch.Size
    strides: tuple[int, ...]
    dtype: torch.dtype

    def within(self, block: Tensor) -> Tensor:
        """The weight that lies here, as a view of the block."""
        values = block[self.start :][: self.shape.numel() * self.dtype.itemsize].view(self.dtype)
        return values.as_strided(self.shape, self.strides)


@dataclass(frozen=True, slots=True)
class Layout:
    """How the weights of one layer lie in one block of bytes, each with its dtype and strides.

    Attributes:
        num_bytes: of the block.
    """

    places: tuple[_Place, ...]
    num_bytes: int

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Layout:
        """One after the other."""
        places, end = [], 0
        for weight in weights:
            strides = torch.empty_like(weight, device="meta").stride()  # dense, in the same order
            places.append(_Place(end, weight.shape, strides, weight.dtype))
            end += -(-weight.nbytes // _ALIGNMENT) * _ALIGNMENT
        return cls(tuple(places), end)

    def write(self, weights: Sequence[Tensor], block: Tensor) -> None:
        """Copy the weights into a block, uint8 `[num_bytes]`."""
        for place, weight in zip(self.places, weights, strict=True):
            place.within(block).copy_(weight)

    def views(self, block: Tensor) -> list[Tensor]:
        """The weights that lie in a block, uint8 `[num_bytes]`; no copies."""
        return [place.within(block) for place in self.places]
