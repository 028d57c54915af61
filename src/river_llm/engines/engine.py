"""The few verbs that every engine offers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from river_llm.exit_policy import ExitPolicy


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one pass over the model gives, for the last token of each sequence.

    Attributes:
        logits: `[batch, vocabulary]`, in the model's own dtype.
        exit_layers: int64 `[batch]`, how many backbone layers the token ran.
    """

    logits: Tensor
    exit_layers: Tensor


class Engine(Protocol):
    """A model with its exit river and a KV cache for one batch of sequences.

    Attributes:
        name: what the command line calls it, ``torch``.
        num_layers: L, the number of decoder layers.
        context_length: the most tokens that a sequence may hold; None if there is no limit.
        policy: when tokens leave the backbone; may be set between passes.
    """

    name: str
    num_layers: int
    context_length: int | None
    policy: ExitPolicy

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

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. 0 forgets the batch too."""
        ...
