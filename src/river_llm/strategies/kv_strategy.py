"""What a strategy decides: which entries a token leaves out, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from river_llm.config import Strategy
from river_llm.engines.native_model import AngleLimit
from river_llm.errors import ConfigError
from river_llm.exit_policy import ExitPolicy
from river_llm.exit_router import ExitRouter
from river_llm.strategies.hooked_decoder import HookedDecoder
from river_llm.strategies.running_pass import RunningPass


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Hidden states `[B, capacity, C]` of the positions from `first` on.

    What stands after the positions that are meant may be overwritten.
    """

    first: int
    states: Tensor

    @classmethod
    def of(cls, first: int, states: Tensor) -> HiddenStates:
        """A copy of hidden states `[B, positions, C]`, with room for more."""
        batch, positions, width = states.shape
        room = states.new_empty(batch, max(16, positions * 3 // 2), width)
        room[:, :positions] = states
        return cls(first, room)

    def between(self, start: int, end: int) -> Tensor:
        """Those of the positions from `start` to `end`, `[B, end - start, C]`."""
        return self.states[:, start - self.first : end - self.first]

    def with_more(self, start: int, states: Tensor) -> HiddenStates:
        """These up to `start`, then `states`; in place where there is room."""
        end = start + states.shape[1] - self.first
        if end > self.states.shape[1]:
            return HiddenStates.of(
                self.first, torch.cat([self.between(self.first, start), states], 1)
            )
        self.states[:, start - self.first : end] = states
        return self

    def moved(self, shifts: Sequence[int], length: int, unused: int) -> HiddenStates:
        """Those up to `length`, each sequence moved to the right by so many places; then the first
        `unused` positions of all are left out."""
        return self._without_first(rolled(self.between(self.first, length), shifts), unused)

    def of_sequences(self, rows: Sequence[int], length: int, unused: int) -> HiddenStates:
        """Those of some sequences up to `length`, without the first `unused` positions."""
        return self._without_first(self.between(self.first, length)[list(rows)], unused)

    def _without_first(self, states: Tensor, unused: int) -> HiddenStates:
        """`states` from `first` on, without the first `unused` positions of all."""
        first = max(self.first - unused, 0)
        return HiddenStates.of(first, states[:, first + unused - self.first :])


@dataclass(frozen=True, slots=True)
class CacheState:
    """What the cache holds; a pass makes a new one, and one that is cut short leaves the old.

    Attributes:
        token_ids: int64 `[B, positions]` on the CPU.
        padding_mask: bool `[B, positions]`, true for real tokens; None where all are.
        filled: int64 `[B, positions]`, how many layers, from the first on, hold an entry.
        exit_layers: int64 `[B, positions]`, how many layers each token ran when it came; by then or
            later, others may have been filled in.
        hidden_states: of positions whose entries aren't complete, as far as they have come; None
            unless the strategy goes on with them.
    """

    token_ids: Tensor
    padding_mask: Tensor | None
    filled: Tensor
    exit_layers: Tensor
    hidden_states: HiddenStates | None = None

    @classmethod
    def empty(cls, batch: int) -> CacheState:
        """Without a token."""
        nothing = torch.empty(batch, 0, dtype=torch.long)
        return cls(nothing, None, nothing, nothing)

    @property
    def length(self) -> int:
        """Positions, padding included."""
        return self.token_ids.shape[1]

    def first(self, length: int) -> CacheState:
        """Only the first `length` positions."""
        padding_mask = None if self.padding_mask is None else self.padding_mask[:, :length]
        waiting = self.hidden_states
        return replace(
            self,
            token_ids=self.token_ids[:, :length],
            padding_mask=padding_mask,
            filled=self.filled[:, :length],
            exit_layers=self.exit_layers[:, :length],
            hidden_states=None if waiting is None or length <= waiting.first else waiting,
        )

    def of_sequences(self, sequences: Sequence[int]) -> CacheState:
        """Only these sequences of the batch, without positions that are padding in all of them."""
        rows = list(sequences)
        mask = None if self.padding_mask is None else self.padding_mask[rows]
        unused = 0 if mask is None else int(mask.any(0).long().argmax())
        waiting = self.hidden_states
        return CacheState(
            self.token_ids[rows, unused:],
            None if mask is None or bool(mask[:, unused:].all()) else mask[:, unused:],
            self.filled[rows, unused:],
            self.exit_layers[rows, unused:],
            None if waiting is None else waiting.of_sequences(rows, self.length, unused),
        )

    def moved(self, shifts: Sequence[int], num_layers: int) -> CacheState:
        """Each sequence moved to the right by so many places, where its last ones are forgotten.
        What comes in on the left is padding; where it is in all, it is left out."""
        mask = self.padding_mask
        mask = torch.ones_like(self.token_ids, dtype=torch.bool) if mask is None else mask
        columns = torch.arange(self.length)
        mask = rolled(mask, shifts) & (columns >= torch.tensor(shifts)[:, None])
        unused = int(mask.any(0).long().argmax())
        hidden_states = self.hidden_states
        if hidden_states is not None:
            hidden_states = hidden_states.moved(shifts, self.length, unused)
        return CacheState(
            rolled(self.token_ids, shifts)[:, unused:],
            None if bool(mask[:, unused:].all()) else mask[:, unused:],
            rolled(self.filled, shifts).where(mask, num_layers)[:, unused:],
            rolled(self.exit_layers, shifts).where(mask, num_layers)[:, unused:],
            hidden_states,
        )


class KVStrategy:
    """Base of all. As it stands: the layers that a token skips hold nothing for it, and nothing is
    done about it.

    Attributes:
        name: what the command line calls it.
        fills_all: skipped layers hold an entry, too.
        num_layers: L, how many there are.
    """

    name: ClassVar[Strategy]
    fills_all: ClassVar[bool] = False

    def __init__(self, decoder: HookedDecoder, angle_limit: AngleLimit | None) -> None:
        self.num_layers = len(decoder.layers)
        self.angle_limit = angle_limit

    @classmethod
    def check_policy(cls, policy: ExitPolicy) -> None:
        """See that tokens can leave so.

        Raises:
            ConfigError: the prompt is to leave as a whole.
        """
        if policy.prefill not in ("backbone", "token"):
            raise ConfigError(
                f"the strategy {cls.name} runs prompts through the whole backbone, so the "
                f'prefill rule {policy.prefill} is not for it; take "backbone", or the strategy '
                "river"
            )

    def prompt_start(self, state: CacheState) -> int:
        """From which position on a prompt's pass runs; those before the prompt itself run again."""
        return state.length

    def steps_start(self, state: CacheState, end: int) -> int:
        """From which position on tokens have to run again through all layers, as in single steps,
        before a pass up to `end` positions; the cache's length: none."""
        return state.length

    def begin(self, run: RunningPass, state: CacheState) -> None:
        """A pass begins."""

    def after_layer(self, run: RunningPass, layers_run: int, router: ExitRouter) -> None:
        """Let more tokens leave after `layers_run` layers than the policy does; 0: before all."""

    def run_layer(
        self, run: RunningPass, index: int, hidden_states: Tensor, rows: Tensor | None
    ) -> Tensor:
        """Run a layer, counted from 0, for the tokens that are still in the backbone.

        Args:
            hidden_states: `[B, T, C]`.
            rows: int64, the sequences whose tokens are; None: all.

        Returns:
            `[B, T, C]`, those of the other sequences as they were.
        """
        missing = self.missing(run, index, rows)
        if rows is None:
            return run.run_layer(index, hidden_states, missing=missing)
        output = run.run_layer(index, hidden_states[rows], rows, missing=missing)
        return with_rows(hidden_states, rows, output)

    def run_text_layer(
        self, run: RunningPass, index: int, hidden_states: Tensor, stays: Tensor
    ) -> Tensor:
        """Run a layer in a pass whose tokens leave each on its own.

        Args:
            hidden_states: `[B, T, C]`; tokens that have left have kept those of their exit.
            stays: bool `[B, T]`, which tokens are still in the backbone.

        Returns:
            `[B, T, C]`, those of the other tokens as they were.
        """
        if not bool(stays.any()):
            self.skip_layer(run, index, hidden_states)
            return hidden_states
        left = None if bool(stays.all()) else ~stays
        output = run.run_layer(
            index,
            hidden_states,
            written=None if left is None or self.fills_all else stays,
            missing=self.missing(run, index, None, left),
        )
        return kept_where(stays, output, hidden_states)

    def missing(
        self, run: RunningPass, index: int, rows: Tensor | None, left: Tensor | None = None
    ) -> Tensor | None:
        """Entries of a layer, bool `[rows, run.end]`, that these sequences must not attend to.

        Args:
            left: bool `[rows, T]`, tokens of the pass itself that left before the layer; None: none
                of those that it runs for.
        """
        return None

    def skip_layer(self, run: RunningPass, index: int, hidden_states: Tensor) -> None:
        """A layer that no token of the pass runs; `hidden_states` are those that left."""

    def end(self, run: RunningPass, exit_layers: Tensor, hidden_states: Tensor) -> CacheState:
        """What the cache holds after a pass.

        Args:
            exit_layers: int64 `[B, T]`, how many layers each token ran.
            hidden_states: `[B, T, C]`, with which they left.
        """
        return self.state(run, torch.cat([run.filled, exit_layers], 1))

    def state(
        self, run: RunningPass, filled: Tensor, hidden_states: HiddenStates | None = None
    ) -> CacheState:
        """With these entries after the pass; `exit_layers` are left to the engine."""
        return CacheState(run.token_ids, run.padding_mask, filled, filled, hidden_states)


class NoExit(KVStrategy):
    """The plain backbone: no token leaves."""

    name = "none"

    @classmethod
    def check_policy(cls, policy: ExitPolicy) -> None:
        if policy.kind != "never":
            raise ConfigError(
                "the strategy none has no exits, so it goes with no exit policy but never; "
                "leave the policy out"
            )
        super().check_policy(policy)


def kept_where(stays: Tensor, output: Tensor, hidden_states: Tensor) -> Tensor:
    """Of each token `[B, T, C]` the output where it stays, bool `[B, T]`, or what it had before."""
    return torch.where(stays.to(output.device).unsqueeze(-1), output, hidden_states)


def rolled(rows: Tensor, shifts: Sequence[int]) -> Tensor:
    """Each row of `[B, positions, ...]` moved to the right by so many places; what falls off comes
    in on the left."""
    return torch.stack([row.roll(shift, 0) for row, shift in zip(rows, shifts, strict=True)])


def with_rows(hidden_states: Tensor, rows: Tensor, output: Tensor) -> Tensor:
    """A copy of `[B, T, C]` whose rows `rows` are `output`."""
    return hidden_states.index_copy(0, rows.to(hidden_states.device), output)


def first_unfilled(filled: Tensor, num_layers: int) -> int:
    """The first position that some layer of some sequence holds no entry for."""
    unfilled = (filled < num_layers).any(0).nonzero()
    return int(unfilled[0]) if len(unfilled) else filled.shape[1]
