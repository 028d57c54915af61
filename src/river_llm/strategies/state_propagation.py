"""State propagation: skipped layers get keys and values made of the hidden state at the exit.

After CALM (Schuster et al. 2022, "Confident Adaptive Language Modeling"), which hands the hidden
state of the last layer run to all layers after it; each makes its keys and values of it with its
own norm and projections.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from river_llm.engines.native_model import AngleLimit
from river_llm.strategies.hooked_decoder import HookedDecoder
from river_llm.strategies.kv_strategy import CacheState, KVStrategy
from river_llm.strategies.running_pass import RunningPass
from river_llm.strategies.slot_cache import Place, SlotCache


class StatePropagation(KVStrategy):
    """Every layer holds an entry for every token, of its own output or of where it left."""

    name = "propagate"
    fills_all = True

    def __init__(self, decoder: HookedDecoder, angle_limit: AngleLimit | None) -> None:
        super().__init__(decoder, angle_limit)
        self._writing = False
        names = query_projections(decoder)
        for layer in decoder.layers:
            for name in names:
                linear = layer.linears[name]
                linear.forward = self._unless_writing(linear.forward)

    def run_layer(
        self, run: RunningPass, index: int, hidden_states: Tensor, rows: Tensor | None
    ) -> Tensor:
        if rows is not None:  # of all rows, those that run write over it: one product is one read
            self.skip_layer(run, index, hidden_states)
        return super().run_layer(run, index, hidden_states, rows)

    def skip_layer(self, run: RunningPass, index: int, hidden_states: Tensor) -> None:
        self._writing = True
        try:
            run.write_entries(index, hidden_states)
        finally:
            self._writing = False

    def end(self, run: RunningPass, exit_layers: Tensor, hidden_states: Tensor) -> CacheState:
        return super().end(run, torch.full_like(exit_layers, self.num_layers), hidden_states)

    def _unless_writing(self, forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """A query projection that is spared while only keys and values are wanted."""
        width = 0

        def projection(inputs: Tensor) -> Tensor:
            nonlocal width
            if self._writing and width:
                return inputs.new_zeros(*inputs.shape[:-1], width)
            output = forward(inputs)
            width = output.shape[-1]
            return output

        return projection


@torch.no_grad()
def query_projections(decoder: HookedDecoder) -> list[str]:
    """Names of the linear layers on whose output no key and no value depends, though they run
    before keys and values are cached."""
    layer = decoder.layers[0]
    device = decoder.model.get_input_embeddings().weight.device
    token_ids = torch.arange(3, device=device).unsqueeze(0)
    called: list[str] = []
    changed = ""  # whose output is made another

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], Tensor]:
        def on_output(linear: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            called.append(name)
            if name != changed:
                return output
            ramp = torch.linspace(-1, 1, output.shape[-1]).to(output)  # no norm makes it the same
            return ramp.expand_as(output)

        return on_output

    def entries() -> Tensor:
        cache = SlotCache(len(decoder.layers), batch=1)
        cache.place = Place(0, 3)
        call = decoder.arguments(token_ids, None, cache)[0]
        decoder.write_entries(0, call.args[0], call, cache)
        return torch.cat([cache.layers[0].keys.flatten(), cache.layers[0].values.flatten()])

    handles = [linear.register_forward_hook(hook(name)) for name, linear in layer.linears.items()]
    try:
        expected = entries()
        before_caching = list(called)
        queries = []
        for name in before_caching:
            changed = name
            if torch.equal(entries(), expected):
                queries.append(name)
        return queries
    finally:
        for handle in handles:
            handle.remove()
