"""From logits to the next token."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor
from transformers import LogitsProcessorList, RepetitionPenaltyLogitsProcessor

from river_llm.config import SamplingConfig
from river_llm.engines.step import check_logits
from river_llm.errors import LogitsError
from river_llm.generate.philox import all_exponentials, exponentials

_FIRST_TOKENS = (64, 2048)  # of the most likely ones, in which to look for the mass of top_p


class Sampler:
    """Chooses the tokens of one text.

    A sampled token is the one of the largest p / E, where E is an exponential variate of its own
    (the Gumbel trick), so it is distributed as p. E belongs to seed, place and token alone. So the
    logits of a draft and of the backbone mostly come to the same choice, an answer that was drafted
    and verified is, token for token, the one that plain decoding with this seed gives, and whatever
    else is generated at the time has no say.
    """

    def __init__(self, config: SamplingConfig, index: int = 0, whose: str = "") -> None:
        """
        Args:
            index: of the text among those with this seed.
            whose: said in front of errors.
        """
        self._config = config
        self._index, self._whose = index, whose
        self._seed = secrets.randbits(63) if config.seed is None else config.seed
        self.is_greedy = config.temperature == 0
        self._processors = LogitsProcessorList()
        if config.repetition_penalty != 1:
            self._processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        self._processors.extend(config.processors)
        self._all_noise = lru_cache(16)(self._draw_all)  # of the places of a draft

    @property
    def takes_argmax(self) -> bool:
        """Whether it always chooses the token of the largest logit."""
        return self.is_greedy and not self._processors

    def choose(self, token_ids: list[int], logits: Tensor) -> int:
        """The token that follows a text, by its logits `[V]`; errors as of `choose_with_margin`."""
        return self.choose_with_margin(token_ids, logits)[0]

    def choose_with_margin(self, token_ids: list[int], logits: Tensor) -> tuple[int, float]:
        """The same token, and how far it is ahead of the second: 1 - (score of the second) /
        (score of the first), where a score is p / E, or p if greedy.

        Raises:
            LogitsError: they are no numbers, or the logits processors leave none.
        """
        with _one_thread():
            return self._choose(token_ids, logits)

    def _choose(self, token_ids: list[int], logits: Tensor) -> tuple[int, float]:
        if self._config.processors:  # which may hide what is no number
            check_logits(logits, self._whose)
        processed = self._processed(token_ids, logits)
        largest = processed.max()
        if not math.isfinite(largest):
            check_logits(logits, self._whose)
            raise LogitsError(
                f"{self._whose}the logits processors leave no token to choose from: all are "
                "banned, or their logits are no numbers; take one of the processors away"
            )
        tokens, scores = None, processed
        if not self.is_greedy:
            tokens, scores = self._race((processed - largest) / self._config.temperature, token_ids)
        best = scores.topk(min(2, len(scores)))
        token = int(best.indices[0] if tokens is None else tokens[best.indices[0]])
        if len(best.values) < 2:
            return token, 1.0
        return token, 1 - float((best.values[1] - best.values[0]).exp())

    def _processed(self, token_ids: list[int], logits: Tensor) -> Tensor:
        """Logits after the processors, float32 `[V]`."""
        logits = logits.float()
        if not self._processors:
            return logits
        text = torch.tensor([token_ids], device=logits.device)
        logits = logits.unsqueeze(0)
        for processor in self._processors:  # the list itself looks at each one's signature
            logits = processor(text, logits)
        return logits[0]

    def _race(self, logits: Tensor, token_ids: list[int]) -> tuple[Tensor | None, Tensor]:
        """Log(p / E) + constant of the tokens that top-k, top-p and min-p leave, and which those
        are; None: all."""
        place = len(token_ids)
        least = self._least_logit(logits)
        if least == -math.inf:
            return None, logits - self._all_noise(place, len(logits), logits.device)
        tokens = (logits >= least).nonzero().squeeze(1)
        noise = exponentials(tokens, place, self._seed, self._index).log()
        return tokens, logits[tokens] - noise

    def _draw_all(self, place: int, count: int, device: torch.device) -> Tensor:
        return all_exponentials(count, place, self._seed, self._index, device).log()

    def _least_logit(self, logits: Tensor) -> float:
        """The smallest logit that a token may have, where the largest is 0: every filter comes
        down to one. Each sees what those before it have left."""
        config = self._config
        least, kept = -math.inf, logits
        if 0 < config.top_k < len(logits):
            kept = logits.topk(config.top_k).values
            least = float(kept[-1])
        if config.top_p < 1:
            least = max(least, _least_within(config.top_p * float(kept.exp().sum()), kept))
        if config.min_p > 0:
            least = max(least, math.log(config.min_p))
        return least


def _least_within(mass: float, logits: Tensor) -> float:
    """The smallest of the largest logits whose exponentials come to this mass, as few as do."""
    for count in (*_FIRST_TOKENS, len(logits)):
        largest = logits.topk(min(count, len(logits))).values
        before = largest.exp().cumsum(0)
        if float(before[-1]) >= mass:
            break
    return float(largest[int((before < mass).sum().clamp(max=len(largest) - 1))])


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: more gain nothing on one row of logits, and would go on spinning on
    the cores that the native engine's next step needs. It is PyTorch's setting for the process: a
    thread that first asks for it meanwhile keeps it."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
