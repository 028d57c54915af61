"""Monotonic exit: no token goes deeper than the one before it.

After SkipDecode (Del Corro et al. 2023, "SkipDecode: Autoregressive Skip Decoding with Batching and
Caching for Efficient LLM Inference"): then every layer that a token runs holds the entries of all
tokens before it, and nothing is ever missing. SkipDecode lowers the depth by a schedule; here a
token leaves by the exit policy, like everywhere, or where the token before it left.
"""

from __future__ import annotations

from torch import Tensor

from river_llm.exit_router import ExitRouter
from river_llm.strategies.kv_strategy import CacheState, KVStrategy, first_unfilled
from river_llm.strategies.running_pass import RunningPass


class MonotonicExit(KVStrategy):
    """Depth never grows along a sequence.

    A new prompt begins anew: its pass runs the tokens that left before it through all layers, for
    the prompt's own tokens could go no deeper otherwise.
    """

    name = "monotonic"
    _deepest: Tensor | None = None  # [B], how deep each sequence may go

    def prompt_start(self, state: CacheState) -> int:
        return first_unfilled(state.filled, self.num_layers)

    def begin(self, run: RunningPass, state: CacheState) -> None:
        self._deepest = state.exit_layers[:, -1] if run.start else None

    def after_layer(self, run: RunningPass, layers_run: int, router: ExitRouter) -> None:
        if layers_run == self.num_layers or not run.leave_apart:
            return
        left = ~router.in_backbone
        if run.is_real is not None:
            left &= run.is_real
        if self._deepest is not None:
            left[:, 0] |= self._deepest <= layers_run
        left = left.long().cummax(1).values.bool()  # so do all tokens after one that has left
        router.leave(left & router.in_backbone, after=layers_run)
