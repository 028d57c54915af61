"""A KV cache in which every layer has one slot for each position, filled or not.

What a token leaves out stays an empty slot: nothing is written, moved or copied for it. Blocks of
slots grow by half, so that a step appends in place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

_FEWEST_SLOTS = 64


@dataclass(frozen=True, slots=True)
class Place:
    """Where the tokens of a layer's call stand.

    Attributes:
        start, end: their positions in the cache, `end` excluded.
        rows: int64 `[rows]`, which sequences of the batch they belong to; None: all, in order.
        written: bool `[rows, end - start]`, which of them are written; None: all.
    """

    start: int
    end: int
    rows: Tensor | None = None
    written: Tensor | None = None


class EntriesWritten(Exception):  # noqa: N818  no error: the way out of a layer's forward
    """The layer's keys and values are in their slots, and no more was wanted of it."""


class SlotCache(Cache):  # type: ignore[misc]  # transformers is untyped here
    """The slots of all layers, for one batch of sequences.

    Attributes:
        place: of the tokens that run; set before each call of the decoder or of a layer.
        entries_only: raise `EntriesWritten` once a layer has written its keys and values.
    """

    def __init__(self, num_layers: int, batch: int) -> None:
        super().__init__(layers=[_SlotLayer(self, batch) for _ in range(num_layers)])
        self._batch = batch
        self.place = Place(0, 0)
        self.entries_only = False

    def moved(self, shifts: Sequence[int], length: int, unused: int) -> SlotCache:
        """The first `length` slots with each sequence moved to the right by so many places, where
        the last ones are forgotten; then the first `unused` slots of all are left out."""
        return self._changed(
            self._batch, lambda slots: _moved(slots, shifts, length)[:, :, unused:]
        )

    def of_sequences(self, sequences: Sequence[int], length: int, unused: int) -> SlotCache:
        """The first `length` slots of these sequences, without the first `unused`."""
        rows = list(sequences)
        return self._changed(len(rows), lambda slots: slots[rows, :, unused:length])

    def _changed(self, batch: int, change: Callable[[Tensor], Tensor]) -> SlotCache:
        cache = SlotCache(len(self.layers), batch)
        for layer, copy in zip(self.layers, cache.layers, strict=True):
            if layer.is_initialized:
                copy.keys, copy.values = change(layer.keys), change(layer.values)
                copy.is_initialized = True
        return cache


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values `[batch, heads, slots, head_dim]` of one layer."""

    is_sliding = False

    def __init__(self, cache: SlotCache, batch: int) -> None:
        super().__init__()
        self._cache = cache
        self._batch = batch

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (
            states.new_zeros(self._batch, states.shape[1], 0, states.shape[3])
            for states in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the entries of the running tokens; all slots of their sequences up to them."""
        place = self._cache.place
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys.shape[2] < place.end:
            slots = max(_FEWEST_SLOTS, place.end, self.keys.shape[2] * 3 // 2)
            self.keys, self.values = _grown(self.keys, slots), _grown(self.values, slots)
        _write(self.keys, key_states, place)
        _write(self.values, value_states, place)
        if self._cache.entries_only:
            raise EntriesWritten
        return _read(self.keys, place), _read(self.values, place)

    def get_seq_length(self) -> int:
        return self._cache.place.start

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.place.start + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its older name


def _grown(slots: Tensor, number: int) -> Tensor:
    # zeros, for an empty slot's weight of 0 times what no number is were no number
    grown = slots.new_zeros(*slots.shape[:2], number, slots.shape[3])
    grown[:, :, : slots.shape[2]] = slots
    return grown


def _moved(slots: Tensor, shifts: Sequence[int], length: int) -> Tensor:
    if slots.shape[2] < length:  # its last tokens have left before it
        slots = _grown(slots, length)
    rows = zip(slots[:, :, :length], shifts, strict=True)
    return torch.stack([row.roll(shift, 1) for row, shift in rows])


def _write(slots: Tensor, entries: Tensor, place: Place) -> None:
    span = slice(place.start, place.end)
    if place.written is not None:
        old = slots[:, :, span] if place.rows is None else slots[place.rows, :, span]
        entries = torch.where(place.written[:, None, :, None], entries, old)
    if place.rows is None:
        slots[:, :, span] = entries
    else:
        slots[place.rows, :, span] = entries


def _read(slots: Tensor, place: Place) -> Tensor:
    if place.rows is None:
        return slots[:, :, : place.end]
    return slots[place.rows, :, : place.end]
