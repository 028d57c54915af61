"""KV recompute: missing entries are computed when a later token needs them.

After EE-LLM (Chen et al. 2023, "EE-LLM: Large-Scale Training and Inference of Early-Exit Large
Language Models with 3D Parallelism"), whose KV recomputation runs the tokens that left early in one
batch with a later token that goes on. Here each waits with its hidden state where it left, and runs
just the layers that the later token reaches.

Every token has then run every layer that a token after it runs, with all entries before it in
place. So what is cached is the backbone's own, and depths never grow along a sequence: a layer
holds the entries of the first so many positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_llm.strategies.kv_strategy import (
    CacheState,
    HiddenStates,
    KVStrategy,
    first_unfilled,
    with_rows,
)
from river_llm.strategies.running_pass import RunningPass


class KVRecompute(KVStrategy):
    """Before a token runs a layer, all tokens before it do."""

    name = "recompute"

    def steps_start(self, state: CacheState, end: int) -> int:
        """A pass has the rotary angles of its last token. Where those of a waiting token were
        others, its entries would not be the backbone's."""
        first = first_unfilled(state.filled, self.num_layers)
        limit = self.angle_limit
        if first < state.length and limit is not None and limit.is_crossed(first + 1, end):
            return first
        return state.length

    def begin(self, run: RunningPass, state: CacheState) -> None:
        # starts[l, b]: the first position of sequence b that layer l holds no entry for
        layers = torch.arange(self.num_layers)[:, None, None]
        self._starts = (run.filled > layers).sum(-1)
        self._waiting = state.hidden_states
        self._caught_up: HiddenStates | None = None  # those that this pass takes along

    def run_layer(
        self, run: RunningPass, index: int, hidden_states: Tensor, rows: Tensor | None
    ) -> Tensor:
        starts = self._starts[index] if rows is None else self._starts[index][rows]
        start = int(starts.min())
        if start == run.start:
            return super().run_layer(run, index, hidden_states, rows)
        waiting = self._take_along(run, start)
        chosen = slice(None) if rows is None else rows
        inputs = torch.cat([waiting[chosen], hidden_states[chosen]], 1)
        written = None
        if bool((starts != start).any()):  # some sequences have caught up further than others
            written = torch.arange(start, run.end) >= starts.unsqueeze(1)
        output = run.run_layer(index, inputs, rows, start=start, written=written)
        caught_up, new = output[:, : run.start - start], output[:, run.start - start :]
        if written is not None:
            is_written = written[:, : run.start - start, None].to(output.device)
            caught_up = torch.where(is_written, caught_up, waiting[chosen])
        waiting[chosen] = caught_up
        return new if rows is None else with_rows(hidden_states, rows, new)

    def run_text_layer(
        self, run: RunningPass, index: int, hidden_states: Tensor, stays: Tensor
    ) -> Tensor:
        """All tokens go on, with those that wait: a later one may need them."""
        del stays
        return self.run_layer(run, index, hidden_states, None)

    def end(self, run: RunningPass, exit_layers: Tensor, hidden_states: Tensor) -> CacheState:
        if run.is_text:
            exit_layers = torch.full_like(exit_layers, self.num_layers)
        filled = torch.maximum(run.filled, exit_layers[:, -1:])
        filled = torch.cat([filled, exit_layers], 1)
        first = first_unfilled(filled, self.num_layers)
        if first == run.end:
            return self.state(run, filled)
        return self.state(run, filled, self._still_waiting(run, first, hidden_states))

    def _take_along(self, run: RunningPass, start: int) -> Tensor:
        """Hidden states `[B, run.start - start, C]` of waiting tokens, to be written to."""
        assert self._waiting is not None
        taken = self._caught_up
        if taken is None:
            taken = HiddenStates.of(start, self._waiting.between(start, run.start))
        elif start < taken.first:
            more = self._waiting.between(start, taken.first)
            both = torch.cat([more, taken.between(taken.first, run.start)], 1)
            taken = HiddenStates.of(start, both)
        self._caught_up = taken
        return taken.between(start, run.start)

    def _still_waiting(self, run: RunningPass, first: int, hidden_states: Tensor) -> HiddenStates:
        """From position `first` on, after the pass; those before it are left as they were."""
        taken = self._caught_up
        if first >= run.start:
            return HiddenStates.of(run.start, hidden_states)
        assert self._waiting is not None
        if taken is None:
            return self._waiting.with_more(run.start, hidden_states)
        parts = [taken.between(max(first, taken.first), run.start), hidden_states]
        if first < taken.first:
            parts.insert(0, self._waiting.between(first, taken.first))
        return HiddenStates.of(first, torch.cat(parts, 1))
