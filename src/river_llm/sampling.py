"""From logits to the next token, with the logits processors of `transformers`."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
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
from river_llm.engines.engine import check_logits
from river_llm.errors import LogitsError

__all__ = ["Sampler", "SamplingConfig"]


class Sampler:
    """Chooses the tokens of one sequence.

    The random numbers of a token are drawn for its place in the answer and not for the pass that
    computes its logits: one exponential variate E for each token of the vocabulary, and the choice
    is the token of the largest p / E, which is distributed as p (the exponential form of the Gumbel
    trick). So logits of a draft and of the backbone, looked at for the same place, mostly come to
    the same choice, and an answer that was drafted and verified is, token for token, the one that
    plain decoding with the same seed gives.
    """

    def __init__(self, config: SamplingConfig, row: int = 0, whose: str = "") -> None:
        """
        Args:
            row: the sequence's place in its batch: each has random numbers of its own.
            whose: said in front of errors.
        """
        self._whose = whose
        self.is_greedy = config.temperature == 0
        seed = None if config.seed is None else config.seed + row
        self._random = np.random.Generator(np.random.SFC64(seed))
        self._noise: deque[Tensor] = deque()  # of the places from `_settled` on
        self._settled = 0
        self._processors = LogitsProcessorList()
        self._reads_text = config.repetition_penalty != 1
        if self._reads_text:
            self._processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
        self._processors.extend(config.processors)
        self._takes_all = bool(config.processors)  # who knows what they look at
        self._reads_text |= self._takes_all
        self._vocabulary = 0  # logits of a choice; drafts may have those of the first tokens only
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

    def choose(self, token_ids: list[int], logits: Tensor, place: int) -> int:
        """The token that follows `token_ids`, the answer's token number `place`, by its logits
        `[V]`. Places before one that was settled can't be asked for any more.

        Raises:
            LogitsError: they are no numbers, or the logits processors leave none.
        """
        self._vocabulary = len(logits)
        with _one_thread():
            if self._takes_all:  # which may hide them
                check_logits(logits, self._whose)
            scores = self._scores(token_ids, logits, place)
            token = int(scores.argmax())  # that of NaN, if there is one
            if not math.isfinite(scores[token]):
                check_logits(logits, self._whose)
                raise LogitsError(
                    f"{self._whose}the logits processors leave no token to choose from: all are "
                    "banned, or their logits are no numbers; take one of the processors away"
                )
            return token

    def choose_with_margin(
        self, token_ids: list[int], logits: Tensor, place: int
    ) -> tuple[int, float]:
        """The same token, and how far it is ahead of the second: 1 - (score of the second) /
        (score of the first), where a greedy score is the probability. By the logits of the
        vocabulary's first tokens alone, if there are no others; there was a choice before then."""
        with _one_thread():
            (first, second), tokens = self._scores(token_ids, logits, place).topk(2)
            margin = 1 - float((second - first).exp() if self.is_greedy else second / first)
            return int(tokens[0]), margin

    def settle(self, places: int) -> None:
        """The first `places` tokens of the answer are chosen for good."""
        while self._settled < places:
            if self._noise:
                self._noise.popleft()
            self._settled += 1

    def _scores(self, token_ids: list[int], logits: Tensor, place: int) -> Tensor:
        """Of every token `[V]`: the largest is chosen. Logarithms if greedy."""
        logits = logits.float()
        if self._takes_all and len(logits) < self._vocabulary:
            missing = self._vocabulary - len(logits)
            logits = torch.nn.functional.pad(logits, (0, missing), value=-torch.inf)
        if self._processors:
            # a long text takes its time to copy
            text = token_ids if self._reads_text else []
            if len(logits) < self._vocabulary:  # a penalty of missing tokens is no matter
                text = [token for token in text if token < len(logits)]
            seen = torch.tensor([text], dtype=torch.long, device=logits.device)
            logits = logits.unsqueeze(0)
            for processor in self._processors:  # the list itself looks at each one's signature
                logits = processor(seen, logits)
            logits = logits[0]
        if self.is_greedy:
            return logits
        probabilities = logits.softmax(-1).cpu()
        while len(self._noise) <= place - self._settled:
            # in float64: NumPy's float32 variates are 0 once in 2**23 times, which would be chosen
            noise = self._random.standard_exponential(max(self._vocabulary, len(probabilities)))
            self._noise.append(torch.from_numpy(noise).float())
        return probabilities / self._noise[place - self._settled][: len(probabilities)]


@contextmanager
def _one_thread() -> Iterator[None]:
    """PyTorch on one thread: more gain nothing on one row of logits, and would go on spinning on
    the cores that the native engine's next pass needs. It is PyTorch's setting for the process: a
    thread that first asks for it meanwhile keeps it."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(threads)
