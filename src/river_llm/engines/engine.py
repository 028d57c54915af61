"""The few verbs that every engine offers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from river_llm.exit_policy import ExitPolicy


class StepResult:
    """What one pass over the model gives, for the last token of each sequence.

    After `verify` each attribute has one more dimension, the tokens of the pass: `[batch, tokens]`.

    Attributes:
        exit_layers: int64 `[batch]`, how many backbone layers the token ran.
        similarities: float32 `[L, batch]`, the state transition similarity after each layer, NaN
            where the token had left the backbone; None unless the engine records them.
    """

    def __init__(
        self,
        logits: Tensor | Callable[[], Tensor],
        exit_layers: Tensor,
        best_tokens: Tensor | None = None,
        similarities: Tensor | None = None,
    ) -> None:
        """`logits` may be a function that fetches them, for engines that choose the best token
        themselves."""
        self.exit_layers = exit_layers
        self.similarities = similarities
        self._logits = logits
        self._best_tokens = best_tokens

    @property
    def logits(self) -> Tensor:
        """`[batch, vocabulary]`, in the engine's dtype.

        Raises:
            RiverError: they were not looked at before the engine's next pass.
        """
        if not isinstance(self._logits, Tensor):
            self._logits = self._logits()
        return self._logits

    @property
    def best_tokens(self) -> Tensor:
        """int64 `[batch]`, the token of the largest logit, the first one of equals."""
        if self._best_tokens is None:
            self._best_tokens = self.logits.argmax(-1)
        return self._best_tokens


class Engine(Protocol):
    """A model with its exit river and a KV cache for one batch of sequences.

    Attributes:
        name: what the command line calls it: ``torch``, ``cpu``.
        num_layers: L, the number of decoder layers.
        context_length: the most tokens that a sequence may hold; None if there is no limit.
        device: where it computes.
        policy: when tokens leave the backbone; may be set between passes.
        record_similarities: whether results carry similarities; may be set between passes.
    """

    name: str
    num_layers: int
    context_length: int | None
    device: torch.device
    policy: ExitPolicy
    record_similarities: bool

    @property
    def length(self) -> int:
        """Tokens in the cache, padding included, the same for every sequence of the batch."""
        ...

    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        """Append tokens `[batch, tokens]` to the cache by the policy's prefill rule.

        Args:
            padding_mask: bool `[batch, tokens]`, true for real tokens. Padding stands on the left
                of a first prefill; None where there is none.

        Raises:
            ContextFullError: they don't fit; the cache stays as it was.
        """
        ...

    def decode(self, token_ids: Tensor) -> StepResult:
        """Append one token `[batch]` to each sequence; each leaves by the exit policy.

        Raises:
            ContextFullError: the context is full; the cache stays as it was.
        """
        ...

    def verify(self, token_ids: Tensor) -> StepResult:
        """Append tokens `[batch, tokens]` through the whole backbone, with the logits of every one.

        Raises:
            ContextFullError: they don't fit; the cache stays as it was.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. 0 forgets the batch too."""
        ...
