"""One pass of the model over new tokens, as a strategy sees it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from river_llm.strategies.hooked_decoder import HookedDecoder, LayerCall
from river_llm.strategies.slot_cache import Place, SlotCache


@dataclass(slots=True)
class RunningPass:
    """A pass over tokens `[B, end - start]` that come after `start` others.

    Attributes:
        decoder, cache: of the engine.
        token_ids: int64 `[B, end]`, of all positions.
        padding_mask: bool `[B, end]`, true for real tokens; None where all are.
        filled: int64 `[B, start]`, how many layers hold an entry for each position before. What is
            filled is always the first so many layers.
        leave_apart: each token leaves on its own, by the exit policy; else all are of a prompt,
            which runs the whole backbone.
        call: the arguments that the decoder gave the layer whose turn it is.
    """

    decoder: HookedDecoder
    cache: SlotCache
    token_ids: Tensor
    padding_mask: Tensor | None
    filled: Tensor
    leave_apart: bool
    call: LayerCall | None = None
    _key: tuple[tuple[int, ...] | None, int] | None = None
    _arguments: list[LayerCall] | None = None

    @property
    def start(self) -> int:
        """The first position of the pass."""
        return self.filled.shape[1]

    @property
    def end(self) -> int:
        """The position after its last."""
        return self.token_ids.shape[1]

    @property
    def is_text(self) -> bool:
        """Whether it has several tokens of a sequence that leave each on its own."""
        return self.leave_apart and self.end - self.start > 1

    @property
    def is_real(self) -> Tensor | None:
        """Which tokens of the pass are no padding, bool `[B, end - start]`; None: all."""
        return None if self.padding_mask is None else self.padding_mask[:, self.start :]

    def depths(self, exit_layers: Tensor) -> Tensor:
        """How many layers hold an entry for each token `[B, end - start]`: as many as it ran.
        Padding, which nobody attends to, has all."""
        if self.is_real is None:
            return exit_layers
        return exit_layers.where(self.is_real, len(self.decoder.layers))

    def run_layer(
        self,
        index: int,
        hidden_states: Tensor,
        rows: Tensor | None = None,
        *,
        start: int | None = None,
        written: Tensor | None = None,
        missing: Tensor | None = None,
    ) -> Tensor:
        """What a layer, counted from 0, makes of hidden states `[rows, positions, C]`.

        Args:
            rows: int64 on the CPU, the sequences that they belong to; None: all of the batch.
            start: their first position, where it isn't the pass's own; they go on to `end`.
            written: bool `[rows, positions]`, whose entries the layer writes; None: all.
            missing: bool `[rows, end]`, entries that the tokens don't attend to.
        """
        start = self.start if start is None else start
        if rows is None and start == self.start:
            assert self.call is not None
            call = self.call
        else:
            call = self._arguments_for(rows, start)[index]
        device = hidden_states.device
        self.cache.place = Place(start, self.end, _on(rows, device), _on(written, device))
        return self.decoder.run(index, hidden_states, call, _on(missing, device))

    def write_entries(self, index: int, hidden_states: Tensor) -> None:
        """Have a layer write keys and values of hidden states `[B, end - start, C]`, no more."""
        assert self.call is not None
        self.cache.place = Place(self.start, self.end)
        self.decoder.write_entries(index, hidden_states, self.call, self.cache)

    def _arguments_for(self, rows: Tensor | None, start: int) -> list[LayerCall]:
        """Of every layer, for the tokens of some sequences from `start` on."""
        key = (None if rows is None else tuple(rows.tolist()), start)
        if key != self._key or self._arguments is None:
            chosen = slice(None) if rows is None else rows
            device = self.decoder.model.get_input_embeddings().weight.device
            token_ids = self.token_ids[chosen, start:].to(device)
            padding_mask = None if self.padding_mask is None else self.padding_mask[chosen]
            self.cache.place = Place(start, self.end)
            self._arguments = self.decoder.arguments(token_ids, padding_mask, self.cache)
            self._key = key
        return self._arguments


def _on(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device)
