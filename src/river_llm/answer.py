"""One answer of a batch while it grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from river_llm.engines import Engine
from river_llm.sampling import Sampler, SamplingConfig
from river_llm.text.decoder import IncrementalDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FinishReason = Literal["stop", "length", "context", "interrupted"]


def ended_may_leave(engine: Engine, answers: Sequence[Answer]) -> bool:
    """Whether the engine may forget the answers that have ended: the longest sequence of a batch
    decides over the rotary angles of all, and those of the others have to stay what they are."""
    limit = engine.angle_limit
    if limit is None:
        return True
    longest = max(len(answer.token_ids) - 1 for answer in answers if not answer.has_ended)
    return limit.is_shared_by(engine.length, longest)


class Answer:
    """A prompt and the tokens after it.

    Attributes:
        token_ids: prompt and answer.
        prompt_length: tokens of the prompt.
        exit_layers: of each token of the answer, how many backbone layers ran to produce it.
        finish_reason: None while it grows.
        takes_best: whether it always takes the token of the largest logit.
    """

    def __init__(
        self,
        prompt: list[int],
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig,
        index: int,
        room: int | None,
        name: str = "",
    ) -> None:
        """
        Args:
            index: its place in the batch.
            room: how many tokens the context has for it; None if there is no limit.
            name: said in front of errors.
        """
        self.token_ids = prompt
        self.prompt_length = len(prompt)
        self.exit_layers: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._most = sampling.max_new_tokens
        self._room = room
        self._sampler = Sampler(sampling, index, name)
        self.takes_best = self._sampler.takes_best_token
        self._decoder = IncrementalDecoder(tokenizer, sampling.stop or ())

    @property
    def has_ended(self) -> bool:
        """Whether it takes no more tokens."""
        return self.finish_reason is not None

    @property
    def tokens_left(self) -> int:
        """How many tokens it may still take."""
        most = self._most if self._room is None else min(self._most, self._room)
        return most - len(self.exit_layers)

    def choose(self, logits: Tensor, drafted: list[int] | None = None) -> int:
        """The token after the text and what is `drafted`, by its logits `[V]`.

        Raises:
            LogitsError: see `Sampler.choose`.
        """
        text = [*self.token_ids, *drafted] if drafted else self.token_ids
        return self._sampler.choose(text, logits, len(text) - self.prompt_length)

    def choose_with_margin(self, logits: Tensor, drafted: list[int]) -> tuple[int, float]:
        """The same, and the token's margin; see `Sampler`."""
        text = [*self.token_ids, *drafted]
        return self._sampler.choose_with_margin(text, logits, len(text) - self.prompt_length)

    def take(self, token: int, exit_layer: int, stop_tokens: frozenset[int]) -> str:
        """Append a token, see whether it ends the answer, return the text that it makes certain."""
        self.token_ids.append(token)
        self.exit_layers.append(exit_layer)
        self._sampler.settle(len(self.exit_layers))
        if token in stop_tokens:
            text = self._decoder.end_with(token)
            self.finish_reason = "stop"
        else:
            text = self._decoder.add(token)
            if self._decoder.stopped:
                self.finish_reason = "stop"
            elif len(self.exit_layers) >= self._most:
                self.finish_reason = "length"
            elif self.tokens_left <= 0:
                self.finish_reason = "context"
        if self.finish_reason is not None:
            text += self._decoder.finish()
            if self._decoder.stopped:
                self.finish_reason = "stop"
        return text
