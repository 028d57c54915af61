"""From logits to the next token, with the logits processors of `transformers`."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from river_llm.config import SamplingConfig

__all__ = ["Sampler", "SamplingConfig"]


class Sampler:
    """Chooses the tokens of one sequence."""

    def __init__(self, config: SamplingConfig, row: int = 0) -> None:
        """`row` is the sequence's place in its batch: each has random numbers of its own."""
        self.is_greedy = config.temperature == 0
        self._generator = torch.Generator()
        if config.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(config.seed + row)
        self._processors = LogitsProcessorList()
        if config.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        if self.is_greedy:
            return
        if config.temperature != 1:
            self._processors.append(TemperatureLogitsWarper(config.temperature))
        if config.top_k:
            self._processors.append(TopKLogitsWarper(config.top_k))
        if config.top_p < 1:
            self._processors.append(TopPLogitsWarper(config.top_p))
        if config.min_p > 0:
            self._processors.append(MinPLogitsWarper(config.min_p))

    @property
    def takes_best_token(self) -> bool:
        """Whether it always chooses the token of the largest logit."""
        return self.is_greedy and not self._processors

    def __call__(self, token_ids: list[int], logits: Tensor) -> int:
        """The next token, after `token_ids`, by its logits `[vocabulary]`."""
        if self._processors:
            seen = torch.tensor([token_ids], device=logits.device)
            logits = self._processors(seen, logits.float().unsqueeze(0))[0]
        if self.is_greedy:
            return int(logits.argmax())
        probabilities = logits.float().softmax(-1).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
