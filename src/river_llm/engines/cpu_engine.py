"""The native engine: the Llama family on a CPU, one call into C++ for each step."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from river_llm.backbone import decoder_layers
from river_llm.engines.cache_identity import native_identity
from river_llm.engines.drafting import Choose, Draft, DraftRule, draft_step_by_step
from river_llm.engines.engine import (
    StepResult,
    check_batch,
    check_counts,
    check_room,
    check_sequences,
    check_token_ids,
)
from river_llm.engines.llama_family import check_supported, describe
from river_llm.engines.native_core import Positions, check_built, make_core, one_clear_line
from river_llm.engines.native_model import NativeModel, WeightFormats
from river_llm.engines.weight_packer import (
    WeightPacker,
    check_weights,
    give_up,
    quantized_head,
)
from river_llm.errors import ConfigError, RiverError
from river_llm.exit_policy import ExitPolicy
from river_llm.exit_router import check_depth_limit
from river_llm.ownership import NotCopiedEngine
from river_llm.residency import OffloadStatistics
from river_llm.river import River

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BACKBONE, _RIVER = 0, 1
_PREFILL_ROWS = 1024  # rows of one native call, between which Ctrl-C is heard
_LARGE_VOCABULARY, _VOCABULARY_STEP = 16384, 1024
_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def _in_turn(
    verb: Callable[Concatenate[CpuEngine, _Arguments], _Result],
) -> Callable[Concatenate[CpuEngine, _Arguments], _Result]:
    """A verb that refuses a second thread while one is in any of them.

    The core keeps threads apart in its passes only, not between a pass and what is counted of it.
    """

    @wraps(verb)
    def guarded(
        engine: CpuEngine, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs
    ) -> _Result:
        if not engine._turn.acquire(blocking=False):
            raise RiverError("another thread is using this engine; give each thread its own")
        try:
            return verb(engine, *args, **kwargs)
        finally:
            engine._turn.release()

    return guarded


class CpuEngine(NotCopiedEngine):
    """Decoding in C++ with packed weights; see `Engine` for the verbs.

    Weights of the backbone are bfloat16 or 8-bit codes, those of the river codes of 4, 6 or 8
    bits (2 and 3 bits are held as 4, 5 as 6). Activations are rounded to bfloat16 for products with
    bfloat16 weights and to 16-bit fixed point, one scale a group, for products with codes; sums,
    norms and the residual stream are float32. A row of a batch has the same bits as that row alone.

    One thread at a time: a second one gets a RiverError, and nothing changes.

    Attributes:
        model, formats: what it computes, and how its weights are held.
        embedding: bfloat16 in uint16 `[V, C]`, where its rows can't be read from the LM head.
        kernels: the instruction set in use: amx, avx512bf16, avx512, avx2, neon or portable.
        threads: how many compute.
        backbone_bits, lm_head_bits, kv_bits: 16 (bfloat16) or 8.
    """

    name = "cpu"
    device = torch.device("cpu")

    def __init__(
        self,
        model: PreTrainedModel,
        river: River,
        policy: ExitPolicy,
        *,
        threads: int | None = None,
        backbone_bits: int = 16,
        lm_head_bits: int = 16,
        kv_bits: int = 16,
        kernels: str | None = None,
        free_model: bool = False,
    ) -> None:
        """Pack the weights of `model` and `river`.

        Args:
            threads: by default as many as the process may use.
            kernels: an instruction set in place of the best one; by default the environment
                variable RIVER_LLM_CPU.
            free_model: let go of the model's own weights as they are packed, so that they are never
                held twice; the model can't be run any more then.

        Raises:
            UnsupportedModelError: see `check_supported`.
            ConfigError: a setting is out of its range, or the processor has no such kernels.
            RiverFileError: the river was made from other weights.
            RiverError: the native core was not built.
        """
        check_built()
        check_weights(model)
        check_supported(model, kv_bits)
        layers = decoder_layers(model)
        river.check_fits(layers)
        formats = WeightFormats(
            backbone_bits, lm_head_bits, river.config.bits, river.config.group_size
        )
        self._prepare(describe(model), formats, policy, threads, kernels, kv_bits)
        packer = WeightPacker(self._core, model, self.model, formats)
        embedding = packer.pack_head()
        for index in range(self.num_layers):
            packer.pack_layer(index, river.exit_layers[index])
            if free_model:
                for linear in layers[index].linears.values():
                    give_up(linear)
        if free_model:
            give_up(model.get_output_embeddings())
            give_up(model.get_input_embeddings())
        self._complete(embedding)

    @classmethod
    def of_packed(
        cls,
        model: NativeModel,
        formats: WeightFormats,
        fill: Callable[[list[Any]], Any],
        policy: ExitPolicy,
        *,
        threads: int | None = None,
        kernels: str | None = None,
        kv_bits: int = 16,
        resident_layers: int | None = None,
    ) -> CpuEngine:
        """An engine with weights that another one has packed, of the same model and formats.

        Args:
            fill: writes them into the arrays that it is given, as `packed_weights` held them, and
                returns the embedding, see `embedding`.
            policy, threads, kernels, kv_bits: as for a new one.
            resident_layers: the first so many backbone layers are in memory, the others come back
                from a file, see `offload_to`; None: all are.

        Raises:
            ConfigError, RiverError: see above.
        """
        check_built()
        engine = cls.__new__(cls)
        engine._prepare(model, formats, policy, threads, kernels, kv_bits, resident_layers)
        engine._complete(fill(engine.packed_weights))
        return engine

    def _prepare(
        self,
        model: NativeModel,
        formats: WeightFormats,
        policy: ExitPolicy,
        threads: int | None,
        kernels: str | None,
        kv_bits: int,
        resident_layers: int | None = None,
    ) -> None:
        """All but the weights."""
        self.backbone_bits, self.lm_head_bits = formats.backbone_bits, formats.lm_head_bits
        self.kv_bits = kv_bits
        self.model, self.formats = model, formats
        shape = model.shape
        self.num_layers: int = shape["num_layers"]
        self.context_length = model.context_length
        self.angle_limit = model.angle_limit
        self.record_similarities = False
        self.policy = policy
        self._padding: list[int] = []
        self._length = 0
        self._passes = 0
        self._turn = threading.RLock()  # held by the thread that is in a verb, see `_in_turn`
        self._vocab_size: int = shape["vocab_size"]
        self._windows: list[int] = [parts["window"] for parts in model.layers]
        self._core = make_core(model, formats, threads, kernels, kv_bits, resident_layers)
        self.layer_bytes = tuple(
            self._core.layer_bytes(layer, _BACKBONE) for layer in range(self.num_layers)
        )
        self._depth_limit: int | None = None
        self._held_back = 0
        self._prepared_head_bits: int | None = None  # of the drafts' LM head
        self.draft_head_bits: tuple[int, ...] = (8, 4, 16) if self.lm_head_bits == 16 else (8,)
        self.draft_vocabularies = _draft_vocabularies(self._vocab_size)
        self.kernels, self.threads = self._core.kernels, self._core.threads
        self.setting = (
            f"cpu {self.kernels}, {self.threads} threads, "
            f"backbone {self.backbone_bits} bits, LM head {self.lm_head_bits}"
        )
        if kv_bits == 8:
            self.setting += ", KV cache 8 bits"

    def _complete(self, embedding: Any) -> None:
        self.embedding = embedding
        self.rest_bytes = self._core.packed_bytes - sum(self.layer_bytes)
        if embedding is not None:
            self._core.set_embedding(embedding)
            self.rest_bytes += embedding.nbytes
        self._positions = Positions(self._core, self.model)

    @property
    def packed_weights(self) -> list[Any]:
        """The packed weights, uint8 arrays in the order of a file: of each backbone layer, None
        where it isn't in memory, then river and LM head. They are no copies, and are not to be
        touched after their layer was evicted."""
        return list(self._core.packed_weights)

    @property
    def head_bytes(self) -> int:
        """Of the LM head's packed weights."""
        return int(self._core.head_bytes)

    # ---- layers that aren't in memory ----

    @_in_turn
    def offload_to(self, path: Path) -> None:
        """Evicted layers come back from this file, which holds the `packed_weights` one after the
        other.

        Raises:
            RiverError: it can't be opened, or has another size.
        """
        with one_clear_line():
            self._core.open_weights(str(path))

    @property
    def resident_layers(self) -> int:
        return int(self._core.resident_layers)

    @_in_turn
    def keep_layers(self, count: int) -> None:
        if not 0 <= count <= self.num_layers:
            raise ConfigError(
                f"{count} layers are to stay in memory; the model has {self.num_layers}"
            )
        with one_clear_line():
            self._core.keep_layers(count)

    @property
    def offload_statistics(self) -> OffloadStatistics:
        misses, bytes_read, seconds = self._core.offload_counts
        return OffloadStatistics(self.resident_layers, misses, bytes_read, seconds, self._held_back)

    # ---- verbs ----

    @property
    def policy(self) -> ExitPolicy:
        return self._policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        self._thresholds = list(policy.thresholds(self.num_layers))
        self._policy = policy

    @property
    def depth_limit(self) -> int | None:
        return self._depth_limit

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        check_depth_limit(limit, self.num_layers)
        self._depth_limit = limit

    @property
    def length(self) -> int:
        return self._length

    @_in_turn
    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        tokens = self._token_list(token_ids, dims=2)
        batch, num_tokens = token_ids.shape
        self._begin(batch, num_tokens, padding_mask)
        rule = self.policy.prefill
        if rule in ("backbone", "river"):
            thresholds = [math.inf if rule == "backbone" else -math.inf] * self.num_layers
        else:
            thresholds = self._thresholds
        by_sequence = rule == "sequence"
        together = self.policy.batch == "minimum"
        columns = num_tokens if by_sequence else max(1, _PREFILL_ROWS // batch)
        with self._whole_or_undone([num_tokens] * batch):
            for first in range(0, num_tokens, columns):
                end = min(first + columns, num_tokens)
                rows = [
                    (sequence, column)
                    for sequence in range(batch)
                    for column in range(first, end)
                    if self._length + column >= self._padding[sequence]
                ]
                if not rows:  # nothing but padding
                    continue
                first_row = min(column for _, column in rows)
                result = self._forward(
                    [tokens[sequence * num_tokens + column] for sequence, column in rows],
                    [sequence for sequence, _ in rows],
                    thresholds,
                    [i for i, (_, column) in enumerate(rows) if column == num_tokens - 1],
                    mean_groups=[sequence for sequence, _ in rows] if by_sequence else (),
                    minimum_groups=[0 if by_sequence else column - first_row for _, column in rows]
                    if together
                    else (),
                )
        return result

    @_in_turn
    def decode(self, token_ids: Tensor) -> StepResult:
        tokens = self._token_list(token_ids, dims=1)
        batch = len(tokens)
        self._begin(batch, 1, None)
        rows = list(range(batch))
        together = [0] * batch if self.policy.batch == "minimum" else ()
        with self._whole_or_undone([1] * batch):
            return self._forward(tokens, rows, self._thresholds, rows, minimum_groups=together)

    @_in_turn
    def verify(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        if self.depth_limit is not None and self.depth_limit < self.num_layers:
            raise RiverError(
                "verifying takes the whole backbone; take the depth limit away (no_miss)"
            )
        return self._append(token_ids, counts, [math.inf] * self.num_layers, together=False)

    @_in_turn
    def score(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        return self._append(token_ids, counts, self._thresholds, self.policy.batch == "minimum")

    @_in_turn
    def prepare_drafts(self, lm_head_bits: int) -> None:
        if lm_head_bits in (self.lm_head_bits, self._prepared_head_bits):
            return
        group = self.model.head_group_size
        codes = quantized_head(self._core, self._vocab_size, lm_head_bits, group)
        self._core.set_draft_head(codes, lm_head_bits, group)
        self._prepared_head_bits = lm_head_bits

    @_in_turn
    def draft(
        self,
        token_ids: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        batch = len(self._padding)
        if not len(token_ids) == len(most) == batch:
            raise RiverError(
                f"{len(token_ids)} tokens and {len(most)} lengths, "
                f"but the cache holds {batch} sequences"
            )
        going = [sequence for sequence, count in enumerate(most) if count > 0]
        if not going:
            return [Draft() for _ in token_ids]
        check_token_ids(torch.tensor(token_ids), 1, self._vocab_size)
        self._begin(batch, max(most), None)
        self.prepare_drafts(rule.lm_head_bits)
        thresholds = list(ExitPolicy.fixed(rule.exit_layer).thresholds(self.num_layers))
        draft_head = rule.lm_head_bits != self.lm_head_bits
        vocabulary = rule.vocabulary or 0
        if choose is None:
            with one_clear_line():
                drafted, margins = self._core.draft(
                    going,
                    [token_ids[sequence] for sequence in going],
                    [most[sequence] for sequence in going],
                    thresholds,
                    rule.chances,
                    rule.least_chances,
                    list(rule.stop_tokens),
                    draft_head,
                    vocabulary,
                )
            drafts = [Draft() for _ in token_ids]
            for sequence, row, row_margins in zip(going, drafted, margins, strict=True):
                drafts[sequence] = Draft(row, row_margins)
            return drafts

        def decode(sequences: list[int], tokens: list[int]) -> Tensor:
            rows = list(range(len(tokens)))
            return self._forward(
                tokens, sequences, thresholds, rows, draft_head=draft_head, vocabulary=vocabulary
            ).logits

        try:
            return draft_step_by_step(decode, token_ids, most, rule, choose)
        finally:
            self._cut(self._length)

    @_in_turn
    def rewind(self, counts: Sequence[int]) -> None:
        check_batch(len(self._padding), len(counts))
        lengths = [
            self._length - padding - count
            for padding, count in zip(self._padding, counts, strict=True)
        ]
        if min(counts) < 0 or min(lengths) < 0:
            raise RiverError(f"can't forget {list(counts)} tokens; some sequence hasn't as many")
        self._set_lengths(lengths)
        with one_clear_line():
            self._cut(self._length)

    @_in_turn
    def keep_sequences(self, sequences: Sequence[int]) -> None:
        check_sequences(len(self._padding), sequences)
        lengths = [self._length - self._padding[sequence] for sequence in sequences]
        with one_clear_line():
            self._core.keep_sequences(list(sequences))
        self._set_lengths(lengths)

    @_in_turn
    def truncate(self, length: int) -> None:
        if length < 0:
            raise RiverError(f"the cache can't be cut to {length} tokens; give 0 or more")
        length = min(length, self._length)
        with one_clear_line():
            if length == 0:
                self._core.resize(0)
            else:
                self._cut(length)
        self._length = length
        self._padding = [min(padding, length) for padding in self._padding] if length else []

    @_in_turn
    def cache_identity(self, token_ids: Sequence[int]) -> dict[str, str]:
        with one_clear_line():
            identity = native_identity(
                self._core, self.model, self.formats, self.embedding, token_ids
            )
        return {**identity, "depth limit": str(self.depth_limit)}

    @_in_turn
    def read_cache(self, length: int) -> dict[str, Tensor]:
        if self._padding != [0] or not 0 < length <= self._length:
            raise RiverError(f"the KV cache holds no single sequence of {length} tokens")
        with one_clear_line():
            pages = self._core.read_pages(0, length)
        return {_page_name(index): torch.from_numpy(page) for index, page in enumerate(pages)}

    @_in_turn
    def write_cache(self, tensors: Mapping[str, Tensor], length: int) -> None:
        check_room(length, self.context_length)
        self.truncate(0)
        pages = [tensors.get(_page_name(index)) for index in range(len(tensors))]
        if not all(page is not None and page.dtype is torch.uint8 for page in pages):
            raise RiverError("these are no pages of the native engine's KV cache")
        with one_clear_line():
            self._core.resize(1)
            self._core.write_pages(0, [page.numpy() for page in pages if page is not None], length)
        self._padding, self._length = [0], length

    @_in_turn
    def lengthen(self, length: int) -> None:
        """As if one sequence of so many tokens were in the cache, with keys and values of zero: so
        memory and speed at length can be measured without computing a text.

        Raises:
            ContextFullError, RiverError: it doesn't fit, or the cache holds a batch or more tokens.
        """
        if self._length == 0:
            self._begin(1, length, None)
        elif len(self._padding) != 1 or length < self._length:
            raise RiverError("only one sequence that is shorter can be lengthened")
        else:
            self._begin(1, length - self._length, None)
        with one_clear_line():
            self._core.lengthen(0, length)
        self._length = length

    @property
    def cache_bytes(self) -> int:
        """Memory that the KV cache takes."""
        return int(self._core.cache_bytes)

    @property
    def position_bytes(self) -> int:
        """Of a token's keys and values in all layers."""
        return int(self._core.position_bytes * self.num_layers)

    def step_bytes(self, exit_layer: int, position: int) -> int:
        """Bytes that decoding one token at `position` reads: weights, LM head, keys and values."""
        sides = [_BACKBONE] * exit_layer + [_RIVER] * (self.num_layers - exit_layer)
        weights = sum(self._core.layer_bytes(layer, side) for layer, side in enumerate(sides))
        seen = sum(min(position, window or position) for window in self._windows)
        return int(weights + self._core.head_bytes + self._core.position_bytes * seen)

    # ---- one native call ----

    def _begin(self, batch: int, num_tokens: int, padding_mask: Tensor | None) -> None:
        """See that the tokens fit, and note the padding of new sequences."""
        end = self._length + num_tokens
        check_room(end, self.context_length)
        padding = _padding(padding_mask, batch, num_tokens)
        if self._length == 0:
            with one_clear_line():
                self._core.resize(0)
                self._core.resize(batch)
            self._padding = padding
        elif any(padding):
            raise RiverError("padding stands before the first tokens only; the cache holds some")
        else:
            check_batch(len(self._padding), batch)
        with one_clear_line():
            if self._length > 0:
                self._cut(self._length)  # Ctrl-C may have come before a pass was counted
            self._positions.cover(end - min(self._padding))  # padding has no position

    def _token_list(self, token_ids: Tensor, dims: int) -> list[int]:
        """Row after row; see `check_token_ids`."""
        check_token_ids(token_ids, dims, self._vocab_size)
        tokens: list[int] = token_ids.flatten().tolist()
        return tokens

    def _append(
        self,
        token_ids: Tensor,
        counts: Sequence[int] | None,
        thresholds: list[float],
        together: bool,
    ) -> StepResult:
        """The first `counts` of the tokens `[batch, tokens]`, with the logits of each; where they
        leave `together`, those of one column do."""
        tokens = self._token_list(token_ids, dims=2)
        batch, num_tokens = token_ids.shape
        counts = [num_tokens] * batch if counts is None else list(counts)
        check_counts(counts, batch, num_tokens)
        self._begin(batch, max(counts), None)
        places = [
            sequence * num_tokens + place
            for sequence, count in enumerate(counts)
            for place in range(count)
        ]
        with self._whole_or_undone(counts):
            return self._forward(
                [tokens[place] for place in places],
                [place // num_tokens for place in places],
                thresholds,
                list(range(len(places))),
                minimum_groups=[place % num_tokens for place in places] if together else (),
                shape=(batch, num_tokens),
                places=places,
            )

    @contextmanager
    def _whole_or_undone(self, counts: list[int]) -> Iterator[None]:
        """Count the tokens of what runs within, so many for each sequence, or forget those that
        came before an error or Ctrl-C."""
        try:
            yield
            if len(set(counts)) == 1:
                self._length += counts[0]
            else:
                pairs = zip(self._padding, counts, strict=True)
                self._set_lengths([self._length - padding + count for padding, count in pairs])
        except BaseException:
            self._cut(self._length)
            raise

    def _forward(
        self,
        tokens: list[int],
        sequences: list[int],
        thresholds: list[float],
        logit_rows: list[int],
        mean_groups: Sequence[int] = (),
        minimum_groups: Sequence[int] = (),
        shape: tuple[int, ...] | None = None,
        places: list[int] | None = None,
        draft_head: bool = False,
        vocabulary: int = 0,
    ) -> StepResult:
        """One pass over rows. The result has the rows of logits, in `shape`, in which they stand at
        `places`; by default one after the other."""
        self._passes += 1  # a pass that is refused takes the logits of the last one with it, too
        with one_clear_line():
            best, exits, similarities, held_back = self._core.forward(
                tokens,
                sequences,
                thresholds,
                logit_rows,
                list(mean_groups),
                list(minimum_groups),
                self.record_similarities,
                draft_head,
                vocabulary,
                self.num_layers if self.depth_limit is None else self.depth_limit,
            )
        self._held_back += held_back
        if len(logit_rows) < len(tokens):
            exits = exits[logit_rows]
            if similarities is not None:
                similarities = similarities[:, logit_rows]

        def arranged(array: Any) -> Tensor:
            """`[..., rows]` in the shape of the result."""
            values = torch.from_numpy(array)
            if shape is None:
                return values
            if places is not None and len(places) < math.prod(shape):
                rows = values.new_zeros(*values.shape[:-1], math.prod(shape))
                rows[..., places] = values
                values = rows
            return values.view(*values.shape[:-1], *shape)

        return StepResult(
            exit_layers=arranged(exits),
            logits=partial(self._logits, self._passes, shape or (len(logit_rows),), places),
            best_tokens=arranged(best),
            similarities=None if similarities is None else arranged(similarities),
        )

    @_in_turn
    def _logits(
        self, of_pass: int, shape: tuple[int, ...], places: list[int] | None = None
    ) -> Tensor:
        if of_pass != self._passes:
            raise RiverError("these logits are gone: look at them before the engine's next pass")
        with one_clear_line():
            logits = torch.from_numpy(self._core.logits())
        if places is not None and len(places) < math.prod(shape):
            rows = logits.new_zeros(math.prod(shape), logits.shape[1])
            rows[places] = logits
            logits = rows
        return logits.view(*shape, -1)

    def _set_lengths(self, lengths: list[int]) -> None:
        """Real tokens of each sequence, which may differ."""
        self._length = max(lengths)
        self._padding = [self._length - length for length in lengths]

    def _cut(self, length: int) -> None:
        for sequence, padding in enumerate(self._padding):
            self._core.truncate(sequence, max(0, length - padding))


def _page_name(index: int) -> str:
    return f"page.{index:06}"


def _draft_vocabularies(vocab_size: int) -> tuple[int, ...]:
    """All tokens, and where that saves time, a third: tokenizers number their merges by frequency,
    so that most text is in the first ones (Zhao et al. 2025, FR-Spec)."""
    part = vocab_size // 3 // _VOCABULARY_STEP * _VOCABULARY_STEP
    return (part, vocab_size) if vocab_size >= _LARGE_VOCABULARY else (vocab_size,)


def _padding(mask: Tensor | None, batch: int, num_tokens: int) -> list[int]:
    """How many tokens on the left of each sequence are padding, by a mask of the real ones."""
    if mask is None:
        return [0] * batch
    if tuple(mask.shape) != (batch, num_tokens):
        shape = list(mask.shape)
        raise RiverError(f"the padding mask is {shape}; the tokens are {[batch, num_tokens]}")
    real = mask.bool()
    padding: list[int] = (~real).sum(1).tolist()
    left = torch.arange(num_tokens) >= torch.tensor(padding).unsqueeze(1)
    if not bool((left == real).all()) or max(padding) == num_tokens:
        raise RiverError("padding has to stand on the left of each sequence's tokens")
    return padding
