"""The torch engine's KV cache: sequences of their own lengths, joined to batches for the model.

A batch is one cache of `transformers`, `[B, G, positions, D]` in every layer, whose sequences end
at one position; shorter ones are padded on the left. The sequences of a step stay joined until a
step has others, so that steady decoding copies nothing.

    position    0 1 2 3 4 5 6 7
    sequence 3  a b c d e f g h     start 0, length 8
    sequence 5  . . . a b c d e     start 3, length 5
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from river_llm.engines.kv_cache import Piece, layer_class
from river_llm.errors import RiverError


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences whose keys and values lie in one cache.

    Attributes:
        sequences: ascending.
        starts: the position of each one's first token.
        cache: for the model.
    """

    sequences: list[int]
    starts: list[int]
    cache: Any

    def piece(self, sequence: int, layer: int, length: int) -> Piece:
        """The first `length` tokens of a sequence."""
        row = self.sequences.index(sequence)
        return Piece(self.cache.layers[layer], row, self.starts[row], self.starts[row] + length)


@dataclass
class SequenceCache:
    """See the module.

    Attributes:
        lengths: tokens of each sequence that there is. What a batch holds behind a sequence's end
            doesn't count, so that truncation, and undoing a pass that was cut short, are to leave
            the length as it is meant.
    """

    num_layers: int
    kv_bits: int
    lengths: dict[int, int] = field(default_factory=dict)
    _batches: dict[int, Batch] = field(default_factory=dict)  # by sequence; none where it is empty

    def drop(self, sequence: int) -> None:
        """Forget a sequence."""
        self._batches.pop(sequence, None)
        self.lengths.pop(sequence, None)

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence."""
        self.lengths[sequence] = min(length, self.lengths[sequence])
        if self.lengths[sequence] == 0:
            self._batches.pop(sequence, None)

    def aligned(
        self, sequences: Sequence[int], apart_from: Collection[int] = ()
    ) -> tuple[Batch, int]:
        """A batch that holds these sequences, all ending where the cache ends, and the position of
        that end.

        Others may be in it, no more than these, which end there or earlier: where a few of a batch
        take a break, nothing is copied. Those that it is to be apart from are not among them.
        """
        batch = self._batches.get(sequences[0])
        if batch is None or not set(sequences) <= set(batch.sequences):
            return self._join(sequences)
        others = set(batch.sequences) - set(sequences)
        are_there = all(self._batches.get(other) is batch for other in others)
        if not are_there or len(others) > len(sequences) or others & set(apart_from):
            return self._join(sequences)
        ends = {
            sequence: start + self.lengths[sequence]
            for sequence, start in zip(batch.sequences, batch.starts, strict=True)
        }
        end = ends[sequences[0]]
        if any(ends[s] != end for s in sequences) or max(ends.values()) > end:
            return self._join(batch.sequences)
        for layer in batch.cache.layers:
            layer.truncate(end)
        return batch, end

    def read(self, sequence: int, length: int) -> dict[str, Tensor]:
        """Copies on the CPU of the keys and values of a sequence's first `length` tokens."""
        tensors = {}
        for index in range(self.num_layers):
            layer = layer_class(self.kv_bits).joined(
                [self._batches[sequence].piece(sequence, index, length)]
            )
            for name in layer.parts:
                tensors[f"{name}.{index}"] = getattr(layer, name).to("cpu").contiguous()
        return tensors

    def write(
        self, sequence: int, tensors: Mapping[str, Tensor], length: int, like: Tensor
    ) -> None:
        """Make a sequence of what `read` gave, for a model with parameters like this one.

        Raises:
            RiverError: the tensors are not of this form; the sequence is empty then.
        """
        self.truncate(sequence, 0)
        kind = layer_class(self.kv_bits)
        names = [f"{name}.{index}" for index in range(self.num_layers) for name in kind.parts]
        if set(names) != set(tensors) or not all(
            entries.ndim == 4 and entries.shape[0] == 1 and entries.shape[2] == length
            for entries in tensors.values()
        ):
            raise RiverError("this is no KV cache of the torch engine for this model")
        cache = self._new_cache()
        for index in range(self.num_layers):
            # copies: they may be mapped from a file that is replaced later
            parts = {
                name: tensors[f"{name}.{index}"].to(like.device, copy=True) for name in kind.parts
            }
            cache.layers.append(kind())
            cache.layers[index].restore(parts, like.dtype)
        self._batches[sequence] = Batch([sequence], [0], cache)
        self.lengths[sequence] = length

    def _join(self, sequences: Iterable[int]) -> tuple[Batch, int]:
        """Make a batch of these sequences; others that were joined with them lie apart then."""
        sequences = sorted(sequences)
        torn = {id(b): b for s in sequences if (b := self._batches.get(s)) is not None}
        rest = [
            sequence
            for sequence, batch in self._batches.items()
            if id(batch) in torn and sequence not in sequences
        ]
        joined = self._batch(sequences)
        self._batches.update(
            dict.fromkeys(sequences, joined)
            | {sequence: self._batch([sequence]) for sequence in rest}
        )
        return joined, max(self.lengths[sequence] for sequence in sequences)

    def _batch(self, sequences: list[int]) -> Batch:
        lengths = [self.lengths[sequence] for sequence in sequences]
        cache = self._new_cache()
        if any(lengths):
            for index in range(self.num_layers):
                pieces = [
                    self._batches[sequence].piece(sequence, index, length)
                    if length
                    else Piece(None, 0, 0, 0)
                    for sequence, length in zip(sequences, lengths, strict=True)
                ]
                cache.layers.append(layer_class(self.kv_bits).joined(pieces))
        return Batch(sequences, [max(lengths) - length for length in lengths], cache)

    def _new_cache(self) -> Any:
        return Cache(layer_class_to_replicate=layer_class(self.kv_bits))


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where rows of a step stand in a pass over tokens `[B, T]`.

    Attributes:
        rows: int64 `[N]`, ascending.
        sequences, columns: int64 `[N]`, where each stands.
        step_rows: int64 `[B, T]`, the row of each token. Tokens that only fill the pass up are of
            the same sequence where it has one: so they are no less numbers than its own.
        is_real: bool `[B, T]`, which tokens are no such fillers.
    """

    rows: Tensor
    sequences: Tensor
    columns: Tensor
    step_rows: Tensor
    is_real: Tensor

    @classmethod
    def of(
        cls, sequences: Sequence[int], rows: Mapping[int, Sequence[int]], more: int
    ) -> RowPlaces:
        """For some sequences' rows, and so many columns of fillers more."""
        width = max(map(len, rows.values())) + more
        step_rows = torch.full((len(sequences), width), next(iter(rows.values()))[0])
        is_real = torch.zeros(len(sequences), width, dtype=torch.bool)
        for place, sequence in enumerate(sequences):
            own = rows.get(sequence, ())
            if own:
                step_rows[place] = own[-1]
                step_rows[place, : len(own)] = torch.tensor(own)
                is_real[place, : len(own)] = True
        ordered, order = step_rows[is_real].sort()
        places, columns = is_real.nonzero()[order].unbind(1)
        return cls(ordered, places, columns, step_rows, is_real)


def attention_mask(batch: Batch, lengths: Mapping[int, int], past: int, new: Tensor) -> Tensor:
    """Bool `[B, past + T]`, which positions are tokens of the sequences, of which the last T are
    `new`, bool `[B, T]`."""
    positions = torch.arange(past)
    starts = torch.tensor(batch.starts).unsqueeze(1)
    ends = starts + torch.tensor([lengths[s] for s in batch.sequences]).unsqueeze(1)
    return torch.cat([(positions >= starts) & (positions < ends), new], 1)
