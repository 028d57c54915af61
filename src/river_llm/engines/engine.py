"""The few verbs that every engine offers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from river_llm.engines.drafting import Choose, Draft, DraftRule
from river_llm.engines.native_model import AngleLimit
from river_llm.errors import ContextFullError, LogitsError, RiverError
from river_llm.exit_policy import ExitPolicy
from river_llm.residency import OffloadStatistics

NO_TOKEN = -1


class StepResult:
    """What one pass over the model gives, for the last token of each sequence.

    After `verify` and `score` each attribute has one more dimension, the tokens of the pass:
    `[batch, tokens]`.

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
        """int64 `[batch]`, the token of the largest logit, the first one of equals; `NO_TOKEN` (-1)
        where that is no finite number, NaN being the largest."""
        if self._best_tokens is None:
            best = self.logits.argmax(-1)
            largest = self.logits.gather(-1, best.unsqueeze(-1)).squeeze(-1)
            self._best_tokens = best.where(largest.isfinite(), NO_TOKEN)
        return self._best_tokens


def check_logits(logits: Tensor, whose: str = "") -> None:
    """Validate that the largest of each row of logits `[..., vocabulary]` is a finite number.

    Args:
        whose: said in front of the error.

    Raises:
        LogitsError: one is NaN or infinite, or all are minus infinity.
    """
    largest = logits.amax(-1)
    if bool(largest.isfinite().all()):
        return
    if logits.dtype == torch.float16:
        reason = "an activation left float16's range; take --dtype bfloat16"
    else:
        reason = "the weights of the model or of its river may be damaged; load them anew"
    raise LogitsError(f"{whose}the logits are no numbers: {reason}")


class Engine(Protocol):
    """A model with its exit river and a KV cache for one batch of sequences.

    Attributes:
        name: what the command line calls it: ``torch``, ``cpu``.
        num_layers: L, the number of decoder layers.
        context_length: the most tokens that a sequence may hold; None if there is no limit.
        device: where it computes.
        policy: when tokens leave the backbone; may be set between passes.
        record_similarities: whether results carry similarities; may be set between passes.
        draft_head_bits: widths of the LM head that drafts may take, the fastest first.
        draft_vocabularies: drafts may be made of the first so many tokens; the likely best first,
            the last is all of them.
        kv_bits: of the KV cache: 16, which stands for the model's dtype, or 8.
        setting: what its speed depends on, in words.
        layer_bytes: of each layer's backbone weights.
        rest_bytes: of all other weights: river, LM head, embedding.
        resident_layers: the backbone weights of the first so many layers are in memory, see
            `residency`.
        depth_limit: tokens that would go deeper leave after so many layers, the prompt's too; None:
            there is no limit. May be set between passes.
        offload_statistics: what evicted layers have cost since the engine was made.
        angle_limit: where the rotary angles change; None: nowhere. Those of a batch change for all
            of its sequences, by the length of the longest.
    """

    name: str
    num_layers: int
    context_length: int | None
    device: torch.device
    policy: ExitPolicy
    record_similarities: bool
    draft_head_bits: tuple[int, ...]
    draft_vocabularies: tuple[int, ...]
    angle_limit: AngleLimit | None
    kv_bits: int
    layer_bytes: tuple[int, ...]
    rest_bytes: int
    depth_limit: int | None

    @property
    def resident_layers(self) -> int: ...

    @property
    def offload_statistics(self) -> OffloadStatistics: ...

    @property
    def setting(self) -> str: ...

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

    def verify(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        """Append tokens `[batch, tokens]` through the whole backbone, with the logits of every one.

        Args:
            counts: only the first so many tokens of each sequence are meant, 0 to all of them; what
                the result says of the others means nothing. None: all are.

        Raises:
            ContextFullError: they don't fit; the cache stays as it was.
        """
        ...

    def score(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        """Append tokens `[batch, tokens]` of a given text, with the logits of every one; each
        leaves by the exit policy, as decoding would take it.

        The logits are held until the next pass: give a long text in parts.

        Args:
            counts: as of `verify`.

        Raises:
            ContextFullError: they don't fit; the cache stays as it was.
        """
        ...

    def prepare_drafts(self, lm_head_bits: int) -> None:
        """Make what drafts with an LM head of this width need, where it isn't there yet."""
        ...

    def draft(
        self,
        token_ids: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        """Guess how each sequence goes on after one more token, through the exit layers; the cache
        stays as it was.

        Args:
            token_ids: the token of each sequence that comes next.
            most: drafted tokens of each sequence at most; 0 leaves it out.
            choose: picks a token by its logits; None picks the likeliest one.

        Raises:
            ContextFullError: the longest draft doesn't fit.
        """
        ...

    def rewind(self, counts: Sequence[int]) -> None:
        """Forget the last `counts[i]` tokens of each sequence. The sequences may have different
        lengths then; `length` is that of the longest, and the others count as padded."""
        ...

    def keep_sequences(self, sequences: Sequence[int]) -> None:
        """Forget all sequences of the batch but these, in ascending order. They become the
        sequences 0, 1 and so on; `length` is that of the longest of them.

        Raises:
            RiverError: there are none, not all in the cache, or not in order.
        """
        ...

    def keep_layers(self, count: int) -> None:
        """Keep the backbone weights of the first so many layers in memory, and evict the others,
        which come back when a token goes that deep. May be called between passes.

        Raises:
            ConfigError: the model has fewer layers.
            RiverError: there is nothing that evicted layers could come back from, or a layer can't
                be brought back.
        """
        ...

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` tokens. 0 forgets the batch too."""
        ...

    def cache_identity(self, token_ids: Sequence[int]) -> dict[str, str]:
        """What decides over the keys and values of these tokens, beside their exits and angles, by
        name; see `cache_identity`. Those of tokens that never left don't depend on ``"river"``."""
        ...

    def read_cache(self, length: int) -> dict[str, Tensor]:
        """The keys and values of the first `length` tokens of a single sequence, in a form of the
        engine's own, on the CPU; good until its next pass.

        Raises:
            RiverError: the cache holds no single sequence, or fewer tokens.
        """
        ...

    def write_cache(self, tensors: Mapping[str, Tensor], length: int) -> None:
        """Begin anew with one sequence of `length` tokens, as `read_cache` gave it. The tensors are
        copied.

        Raises:
            RiverError: they are not of this form; the cache is empty then.
            ContextFullError: they don't fit; the cache stays as it was.
        """
        ...


def check_token_ids(token_ids: Tensor, dims: int, rows: int) -> tuple[int, ...]:
    """Validate the token ids of a pass.

    Args:
        dims: 2 for `[batch, tokens]`, 1 for `[batch]`.
        rows: of the model's embedding.

    Returns:
        Their shape.

    Raises:
        RiverError: there are none, they are no whole numbers, or the embedding has no row for one.
    """
    shape = tuple(token_ids.shape)
    if len(shape) != dims or 0 in shape:
        wanted = "[batch, tokens]" if dims == 2 else "[batch]"
        raise RiverError(f"token ids are {list(shape)}; give {wanted}, one of each or more")
    if token_ids.dtype.is_floating_point or token_ids.dtype in (torch.bool, torch.complex64):
        dtype = str(token_ids.dtype).removeprefix("torch.")
        raise RiverError(f"token ids are whole numbers, not {dtype}")
    least, most = (int(value) for value in token_ids.aminmax())
    if least < 0:
        of_logits = f" ({NO_TOKEN} comes from logits that are no numbers)"
        raise RiverError(
            f"there is no token {least}; token ids are 0 to {rows - 1}"
            + of_logits * (least == NO_TOKEN)
        )
    if most >= rows:
        raise RiverError(
            f"there is no token {most}: the model's embedding has {rows} rows, and a tokenizer "
            "that gives this token has more; take the model's own tokenizer, or resize the "
            "embedding (resize_token_embeddings)"
        )
    return shape


def check_counts(counts: Sequence[int], batch: int, num_tokens: int) -> None:
    """See that so many tokens of each sequence can be meant, of `[batch, num_tokens]`.

    Raises:
        RiverError: they can't, or none is.
    """
    if len(counts) != batch or not all(0 <= count <= num_tokens for count in counts):
        raise RiverError(
            f"the counts are {list(counts)}; give 0 to {num_tokens} for each of {batch} sequences"
        )
    if not any(counts):
        raise RiverError("there is nothing to verify or score; give one token or more")


def first_tokens(counts: Sequence[int], batch: int, num_tokens: int) -> Tensor:
    """Bool `[batch, num_tokens]`, the first `counts[i]` of each sequence's tokens.

    Raises:
        RiverError: see `check_counts`.
    """
    check_counts(counts, batch, num_tokens)
    return torch.arange(num_tokens) < torch.tensor(counts).unsqueeze(1)


def check_room(length: int, context_length: int | None) -> None:
    """See that so many tokens fit the model's context; None: there is no limit.

    Raises:
        ContextFullError: they don't.
    """
    if context_length is not None and length > context_length:
        raise ContextFullError(
            f"{length} tokens don't fit the model's context of {context_length}; "
            "shorten the prompt or lower the number of new tokens"
        )


def check_sequences(held: int, sequences: Sequence[int]) -> None:
    """See that these sequences of a batch ascend, and that there are such.

    Raises:
        RiverError: they don't, or there aren't.
    """
    ascending = all(one < other for one, other in pairwise(sequences))
    if not sequences or not ascending or sequences[0] < 0 or sequences[-1] >= held:
        raise RiverError(
            f"the cache holds {held} sequences; {list(sequences)} are not some of them in order"
        )


def check_batch(held: int, given: int) -> None:
    """See that tokens are for as many sequences as the cache holds.

    Raises:
        RiverError: they aren't.
    """
    if held != given:
        raise RiverError(f"the cache holds {held} sequences, not {given}; truncate(0) begins anew")
