"""From logits to the next token, with the logits processors of `transformers`."""

from __future__ import annotations

from dataclasses import dataclass

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

from river_llm.errors import ConfigError


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How tokens are chosen and when generation stops.

    Attributes:
        max_new_tokens: at most this many, the stop token among them.
        temperature: 0 takes the likeliest token (greedy).
        top_k: sample among the k likeliest only; 0 for all.
        top_p: sample among the likeliest that hold this share of the probability.
        min_p: leave out tokens less likely than this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that stand in the text already less likely.
        seed: of the random numbers; sequence i of a batch uses seed + i. None draws a new one.
        stop: a string, or several, that end the text where one first appears; not part of it.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] | str = ()

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        ranges = (
            ("max_new_tokens", self.max_new_tokens >= 1, "1 or more"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 or more"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
            ("repetition_penalty", self.repetition_penalty > 0, "above 0"),
            ("seed", self.seed is None or 0 <= self.seed < 2**63, "in [0, 2**63)"),
            ("stop", all(self.stop), "no empty string"),
        )
        for name, holds, wanted in ranges:
            if not holds:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")


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

    def __call__(self, token_ids: list[int], logits: Tensor) -> int:
        """The next token, after `token_ids`, by its logits `[vocabulary]`."""
        if self._processors:
            seen = torch.tensor([token_ids], device=logits.device)
            logits = self._processors(seen, logits.float().unsqueeze(0))[0]
        if self.is_greedy:
            return int(logits.argmax())
        probabilities = logits.float().softmax(-1).cpu()
        return int(torch.multinomial(probabilities, 1, generator=self._generator))
