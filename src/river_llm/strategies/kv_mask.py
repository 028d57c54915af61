"""KV mask: later tokens don't attend to a position in the layers that it skipped.

After D-LLM (Jiang et al. 2024, "D-LLM: A Token Adaptive Computing Resource Allocation Strategy for
Large Language Models"), whose mask leaves the entries of skipped layers out of attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from river_llm.engines.native_model import AngleLimit
from river_llm.strategies.hooked_decoder import HookedDecoder
from river_llm.strategies.kv_strategy import CacheState, KVStrategy
from river_llm.strategies.running_pass import RunningPass


class KVMask(KVStrategy):
    """Layers hold nothing for the tokens that skipped them, and attention is told so."""

    name = "mask"

    def __init__(self, decoder: HookedDecoder, angle_limit: AngleLimit | None) -> None:
        decoder.check_hides_entries()
        super().__init__(decoder, angle_limit)
        self._filled_everywhere = 0

    def begin(self, run: RunningPass, state: CacheState) -> None:
        self._filled_everywhere = int(run.filled.min()) if run.start else self.num_layers

    def missing(
        self, run: RunningPass, index: int, rows: Tensor | None, left: Tensor | None = None
    ) -> Tensor | None:
        if index < self._filled_everywhere and left is None:
            return None
        missing = run.filled <= index
        if rows is not None:
            missing = missing[rows]
        if left is None:
            if not bool(missing.any()):
                return None
            left = torch.zeros(len(missing), run.end - run.start, dtype=torch.bool)
        return torch.cat([missing, left], 1)
