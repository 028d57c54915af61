"""What an engine is: one step over rows, and sequences that are added, cut and dropped."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from river_llm.engines.drafting import Choose, Draft, DraftRule
from river_llm.engines.native_model import RopeBoundary
from river_llm.errors import ContextFullError, LogitsError, RiverError
from river_llm.river.residency import OffloadStatistics

NO_TOKEN = -1


@dataclass(frozen=True, slots=True)
class Step:
    """Rows of one pass over the model. A row is one token of one sequence; the rows of a sequence
    are appended to it in their order.

    Prefill, a decoded batch, a draft's verification, the scoring of a text, random routing and the
    requests of a server differ in nothing but their rows.

    Attributes:
        tokens: `[R]`.
        sequences: `[R]`, as `Engine.add_sequence` numbered them.
        thresholds: float32 `[L]` for every row, or `[R, L]`: a row leaves the backbone after l
            layers where its state transition similarity exceeds entry l (entry 0: -inf leaves at
            once, +inf doesn't); see `ExitPolicy.thresholds`.
        logit_rows: rows that go through the LM head, ascending.
        mean_groups: `[R]`, rows of one group are compared by their mean similarity (the paper's
            prefill); empty: each by its own. Groups are numbered from 0, below R.
        minimum_groups: `[R]`, and then by the smallest of their group (the paper's batch rule).
        record_similarities: whether the result carries them.
        record_margins: whether its margins are wanted: an engine that takes the argmax itself takes
            them with it; they can be had of the logits as well.
    """

    tokens: Sequence[int]
    sequences: Sequence[int]
    thresholds: Tensor
    logit_rows: Sequence[int]
    mean_groups: Sequence[int] = ()
    minimum_groups: Sequence[int] = ()
    record_similarities: bool = False
    record_margins: bool = False


class StepResult:
    """What comes of a step of R rows, of which K went through the LM head.

    Attributes:
        exit_layers: int64 `[R]`, how many backbone layers each row ran.
        similarities: float32 `[L, R]`, the state transition similarity after each layer, NaN where
            the row had left the backbone; None unless the step recorded them.
    """

    def __init__(
        self,
        logits: Tensor | Callable[[], Tensor],
        exit_layers: Tensor,
        best_tokens: Tensor | None = None,
        similarities: Tensor | None = None,
        margins: Tensor | None = None,
    ) -> None:
        """`logits` may be a function that fetches them, for engines that take argmax and margins
        themselves."""
        self.exit_layers = exit_layers
        self.similarities = similarities
        self._logits = logits
        self._best_tokens = best_tokens
        self._margins = margins

    @property
    def logits(self) -> Tensor:
        """`[K, vocabulary]`, in the engine's dtype.

        Raises:
            RiverError: they were not looked at before the engine's next pass.
        """
        if not isinstance(self._logits, Tensor):
            self._logits = self._logits()
        return self._logits

    @property
    def best_tokens(self) -> Tensor:
        """int64 `[K]`, the argmax, the first of equals; `NO_TOKEN` (-1) where the largest logit is
        no finite number, NaN being the largest."""
        if self._best_tokens is None:
            best = self.logits.argmax(-1)
            largest = self.logits.gather(-1, best.unsqueeze(-1)).squeeze(-1)
            self._best_tokens = best.where(largest.isfinite(), NO_TOKEN)
        return self._best_tokens

    @property
    def margins(self) -> Tensor:
        """float32 `[K]`, 1 - p2 / p1 of the two most likely tokens; NaN where the largest logit is
        no finite number."""
        if self._margins is None:
            first, second = self.logits.float().topk(2).values.unbind(-1)
            self._margins = (1 - (second - first).exp()).where(first.isfinite(), math.nan)
        return self._margins


class Engine(Protocol):
    """A model with its exit river, and a KV cache of sequences of their own lengths.

    Attributes:
        name: what the command line calls it: ``torch``, ``cpu``.
        num_layers: L, the number of decoder layers.
        vocab_size: rows of the embedding.
        context_length: the most tokens that a sequence may hold; None if there is no limit.
        device: where it computes.
        kv_bits: of the KV cache: 16, which stands for the model's dtype, or 8.
        setting: what its speed depends on, in words.
        rope_boundary: the length of a text beyond which rotary angles are rescaled; None: nowhere.
        prefill_rows: rows of a prompt that are best run in one step; None: all of them.
    """

    name: str
    num_layers: int
    vocab_size: int
    context_length: int | None
    device: torch.device
    kv_bits: int
    rope_boundary: RopeBoundary | None

    @property
    def setting(self) -> str: ...

    @property
    def prefill_rows(self) -> int | None: ...

    def forward(self, step: Step) -> StepResult:
        """Append a step's rows to their sequences. After an error, Ctrl-C too, the cache is as it
        was.

        Raises:
            ContextFullError: a sequence outgrows the context.
            RiverError: the step has no rows, or tokens or sequences that there aren't.
        """
        ...

    def add_sequence(self, prompt_length: int = 0) -> int:
        """A new, empty sequence; its number.

        Args:
            prompt_length: tokens of its prompt, where that is run in parts: its rotary angles are
                those of a text of this length from the first part on.
        """
        ...

    def drop_sequence(self, sequence: int) -> None:
        """Forget a sequence; its number may be given again."""
        ...

    def truncate(self, sequence: int, length: int) -> None:
        """Forget all but the first `length` tokens of a sequence; nothing if it has fewer."""
        ...

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        ...

    def sequences(self) -> list[int]:
        """All sequences that there are, ascending."""
        ...


@runtime_checkable
class Drafting(Protocol):
    """An engine that drafts many tokens in one call.

    Attributes:
        draft_head_bits: widths of the LM head that drafts may take, the fastest first.
    """

    draft_head_bits: tuple[int, ...]

    def prepare_drafts(self, lm_head_bits: int) -> None:
        """Make what drafts with an LM head of this width need, where it isn't there yet."""
        ...

    def draft(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        """Guess how some sequences go on, each after one more token; the cache stays as it was.

        Args:
            tokens: that comes next, of each of these sequences.
            most: drafted tokens at most, 1 or more, of each.
            choose: picks a token by its logits; None is greedy.

        Raises:
            ContextFullError: the longest draft doesn't fit.
        """
        ...


@runtime_checkable
class Offloading(Protocol):
    """An engine whose deep backbone layers may be evicted from memory.

    Attributes:
        layer_bytes: of each layer's backbone weights.
        rest_bytes: of all other weights: river, LM head, embedding.
        depth_limit: rows that would go deeper leave after so many layers; None: there is no limit.
            May be set between steps.
    """

    layer_bytes: tuple[int, ...]
    rest_bytes: int
    depth_limit: int | None

    @property
    def resident_layers(self) -> int:
        """The backbone weights of the first so many layers are in memory."""
        ...

    @property
    def offload_statistics(self) -> OffloadStatistics:
        """What evicted layers have cost since the engine was made."""
        ...

    def keep_layers(self, count: int) -> None:
        """Keep the backbone weights of the first so many layers in memory, and evict the others,
        which come back when a token goes that deep. May be called between steps.

        Raises:
            ConfigError: the model has fewer layers.
            RiverError: there is nothing that evicted layers could come back from, or a layer can't
                be brought back.
        """
        ...


@runtime_checkable
class CacheAccess(Protocol):
    """An engine whose KV cache can be written to a file and read again."""

    def cache_identity(self, token_ids: Sequence[int]) -> dict[str, str]:
        """What decides over the keys and values of these tokens, beside their exits and angles, by
        name. Those of tokens that never left don't depend on ``"river"``."""
        ...

    def read_cache(self, sequence: int, length: int) -> dict[str, Tensor]:
        """The keys and values of the first `length` tokens of a sequence, in a form of the engine's
        own, on the CPU; good until its next pass.

        Raises:
            RiverError: the sequence has fewer tokens.
        """
        ...

    def write_cache(self, sequence: int, tensors: Mapping[str, Tensor], length: int) -> None:
        """Make a sequence `length` tokens long, with keys and values as `read_cache` gave them;
        what it held is forgotten. The tensors are copied.

        Raises:
            RiverError: they are not of this form; the sequence is empty then.
            ContextFullError: they don't fit; the sequence stays as it was.
        """
        ...


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


def check_tokens(tokens: Sequence[int], vocab_size: int) -> None:
    """Validate that the embedding has a row for every token of a step.

    Raises:
        RiverError: it hasn't, or there are no tokens.
    """
    if not tokens:
        raise RiverError("a step has no rows; give one token or more")
    least, most = min(tokens), max(tokens)
    if least < 0:
        of_logits = f" ({NO_TOKEN} comes from logits that are no numbers)"
        raise RiverError(
            f"there is no token {least}; token ids are 0 to {vocab_size - 1}"
            + of_logits * (least == NO_TOKEN)
        )
    if most >= vocab_size:
        raise RiverError(
            f"there is no token {most}: the model's embedding has {vocab_size} rows, and a "
            "tokenizer that gives this token has more; take the model's own tokenizer, or resize "
            "the embedding (resize_token_embeddings)"
        )


def check_room(length: int, context_length: int | None) -> None:
    """Validate that so many tokens fit the model's context; None: there is no limit.

    Raises:
        ContextFullError: they don't.
    """
    if context_length is not None and length > context_length:
        raise ContextFullError(
            f"{length} tokens don't fit the model's context of {context_length}; "
            "shorten the prompt or lower the number of new tokens"
        )
