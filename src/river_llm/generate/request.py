"""One prompt and its answer while it grows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from river_llm.config import DraftConfig, SamplingConfig
from river_llm.generate.ngrams import NgramIndex
from river_llm.generate.sampler import Sampler
from river_llm.river.policy import ExitPolicy
from river_llm.text.decoder import IncrementalDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length", "context", "interrupted"]


class Request:
    """What is asked of a `Generator`, and what has come of it so far.

    Attributes:
        tokens: prompt and answer. All but the last are in the engine's cache between two steps.
        prompt_length: tokens of the prompt.
        policy: when its tokens leave the backbone. None: never; they are drafted and verified
            (lossless mode).
        drafts: how they are drafted.
        stop_tokens: ids that end the answer.
        sampler: chooses its tokens.
        ngrams: what followed pairs of its tokens before, for drafts.
        sequence: its number in the engine; -1 while it isn't there.
        cached_tokens: tokens of the prompt that were in the engine's cache when it was added.
        exit_layers: of each token of the answer, how many backbone layers ran to produce it.
        finish_reason: None while the answer grows.
        error: why it couldn't go on; None: it could.
        looked_at: its tokens up to the last second look; those needn't run again.
        may_draft: false for the next step, where one with a draft gave no numbers.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        policy: ExitPolicy | None = None,
        *,
        drafts: DraftConfig | None = None,
        stop_tokens: frozenset[int] = frozenset(),
        index: int = 0,
        name: str = "",
    ) -> None:
        """
        Args:
            index: of the text among those with this seed, see `Sampler`.
            name: said in front of errors.
        """
        self.tokens = list(prompt)
        self.prompt_length = len(prompt)
        self.policy = policy
        self.drafts = drafts or DraftConfig()
        self.stop_tokens = stop_tokens
        self.name = name
        self.sampler = Sampler(sampling, index, name)
        self.ngrams = NgramIndex()
        self.sequence = -1
        self.cached_tokens = 0
        self.exit_layers: list[int] = []
        self.finish_reason: FinishReason | None = None
        self.error: Exception | None = None
        self.looked_at = 0
        self.may_draft = True
        self._most = sampling.max_new_tokens
        self._room = sys.maxsize  # of the context, for the answer
        self._decoder = IncrementalDecoder(tokenizer, sampling.stop or ())

    @property
    def is_lossless(self) -> bool:
        """Whether every token is to be the backbone's."""
        return self.policy is None

    @property
    def has_ended(self) -> bool:
        """Whether it takes no more tokens."""
        return self.finish_reason is not None or self.error is not None

    @property
    def tokens_left(self) -> int:
        """How many tokens the answer may still take."""
        return min(self._most, self._room) - len(self.exit_layers)

    def fit(self, context_length: int | None) -> None:
        """End the answer where the context ends; None: there is no limit."""
        if context_length is not None:
            self._room = context_length - self.prompt_length + 1  # the last one isn't run

    def up_to_stop(self, tokens: list[int]) -> list[int]:
        """The tokens up to the first that ends the answer."""
        for place, token in enumerate(tokens):
            if token in self.stop_tokens:
                return tokens[: place + 1]
        return tokens

    def take(self, token: int, exit_layer: int) -> str:
        """Append a token to the answer, which it may end; the text that is certain now."""
        self.tokens.append(token)
        self.exit_layers.append(exit_layer)
        if token in self.stop_tokens:
            text = self._decoder.end_with(token)
            self.finish_reason = "stop"
            return text
        text = self._decoder.add(token)
        if not self._decoder.stopped and self.tokens_left <= 0:
            is_long = len(self.exit_layers) >= self._most
            self.finish_reason = "length" if is_long else "context"
            text += self._decoder.finish()  # which may complete a stop string
        if self._decoder.stopped:
            self.finish_reason = "stop"
        return text
