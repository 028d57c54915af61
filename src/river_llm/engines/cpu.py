"""The native engine: the Llama family on a CPU, one call into C++ for each step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from river_llm.engines.cache_identity import native_identity
from river_llm.engines.drafting import Choose, Draft, DraftRule, draft_step_by_step
from river_llm.engines.llama import check_supported, describe
from river_llm.engines.native_core import Positions, check_built, make_core, one_clear_line
from river_llm.engines.native_model import NativeModel, WeightFormats
from river_llm.engines.step import Step, StepResult, check_room, check_tokens
from river_llm.engines.weight_packer import (
    WeightPacker,
    check_weights,
    give_up,
    held_bits,
    quantized_head,
)
from river_llm.errors import ConfigError, RiverError
from river_llm.ownership import NotCopiedEngine
from river_llm.river.backbone import decoder_layers
from river_llm.river.policy import ExitPolicy
from river_llm.river.residency import OffloadStatistics
from river_llm.river.river import River
from river_llm.river.router import check_depth_limit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BACKBONE, _RIVER = 0, 1


class CpuEngine(NotCopiedEngine):
    """Decoding in C++ with packed weights; an `Engine` that drafts, offloads and gives its cache.

    Weights of the backbone are bfloat16 or 8-bit codes, those of the river codes of 8 or 3
    to 6 bits (2 bits are held as 3, matrices of one product as the widest of them).
    Activations are rounded to bfloat16 for products with bfloat16 weights and to 16-bit fixed
    point, one scale a group, for products with codes; sums,
    norms and the residual stream are float32. A row has the same bits whatever rows stand beside
    it (batch invariance).

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
    prefill_rows: int | None = 1024

    def __init__(
        self,
        model: PreTrainedModel,
        river: River,
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
            backbone_bits, lm_head_bits, held_bits(model, river), river.config.group_size
        )
        self._prepare(describe(model), formats, threads, kernels, kv_bits)
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
            threads, kernels, kv_bits: as for a new one.
            resident_layers: the first so many backbone layers are in memory, the others come back
                from a file, see `offload_to`; None: all are.

        Raises:
            ConfigError, RiverError: see above.
        """
        check_built()
        engine = cls.__new__(cls)
        engine._prepare(model, formats, threads, kernels, kv_bits, resident_layers)
        engine._complete(fill(engine.packed_weights))
        return engine

    def _prepare(
        self,
        model: NativeModel,
        formats: WeightFormats,
        threads: int | None,
        kernels: str | None,
        kv_bits: int,
        resident_layers: int | None = None,
    ) -> None:
        """All but the weights."""
        self.backbone_bits, self.lm_head_bits = formats.backbone_bits, formats.lm_head_bits
        self.kv_bits = kv_bits
        self.model, self.formats = model, formats
        self.num_layers: int = model.shape["num_layers"]
        self.vocab_size: int = model.shape["vocab_size"]
        self.context_length = model.context_length
        self.rope_boundary = model.rope_boundary
        self._core = make_core(model, formats, threads, kernels, kv_bits, resident_layers)
        self.kernels, self.threads = self._core.kernels, self._core.threads
        self.setting = (
            f"cpu {self.kernels}, {self.threads} threads, "
            f"backbone {self.backbone_bits} bits, LM head {self.lm_head_bits}"
        ) + ", KV cache 8 bits" * (kv_bits == 8)
        layers = range(self.num_layers)
        self.layer_bytes = tuple(self._core.layer_bytes(layer, _BACKBONE) for layer in layers)
        self._depth_limit: int | None = None
        self._draft_head_bits: int | None = None  # of the drafts' own LM head, once there is one
        self.draft_head_bits: tuple[int, ...] = (8, 4, 16) if self.lm_head_bits == 16 else (8,)

    def _complete(self, embedding: Any) -> None:
        self.embedding = embedding
        self.rest_bytes = self._core.packed_bytes - sum(self.layer_bytes)
        if embedding is not None:
            self._core.load_head({"embedding": embedding})
            self.rest_bytes += embedding.nbytes
        self._positions = Positions(self._core, self.model)

    # ---- Engine ----

    def forward(self, step: Step) -> StepResult:
        check_tokens(step.tokens, self.vocab_size)
        return self._forward(step)

    def _forward(self, step: Step, draft_head: bool = False) -> StepResult:
        """One native call, with the LM head that drafts have if so said."""
        thresholds = step.thresholds.detach().to("cpu", torch.float32).contiguous().numpy()
        with one_clear_line():
            end = self._core.longest_after(step.sequences)
            check_room(end, self.context_length)
            self._positions.cover(end)
            best, exits, similarities, margins, number = self._core.forward(
                step.tokens,
                step.sequences,
                thresholds,
                step.logit_rows,
                step.mean_groups,
                step.minimum_groups,
                step.record_similarities,
                step.record_margins,
                draft_head,
                self.num_layers if self._depth_limit is None else self._depth_limit,
            )
        return StepResult(
            partial(self._logits, number),
            torch.from_numpy(exits),
            torch.from_numpy(best),
            None if similarities is None else torch.from_numpy(similarities),
            None if margins is None else torch.from_numpy(margins),
        )

    def _logits(self, number: int) -> Tensor:
        with one_clear_line():
            return torch.from_numpy(self._core.logits(number))

    def add_sequence(self, prompt_length: int = 0) -> int:
        with one_clear_line():
            return int(self._core.add_sequence(prompt_length))

    def drop_sequence(self, sequence: int) -> None:
        with one_clear_line():
            self._core.drop_sequence(sequence)

    def truncate(self, sequence: int, length: int) -> None:
        with one_clear_line():
            self._core.truncate(sequence, length)

    def length(self, sequence: int) -> int:
        with one_clear_line():
            return int(self._core.length(sequence))

    def sequences(self) -> list[int]:
        return list(self._core.sequences())

    # ---- Drafting ----

    def prepare_drafts(self, lm_head_bits: int) -> None:
        if lm_head_bits in (self.lm_head_bits, self._draft_head_bits):
            return
        group = self.model.head_group_size
        with one_clear_line():
            codes = quantized_head(self._core, self.vocab_size, lm_head_bits, group)
            self._core.load_draft_head(codes, lm_head_bits, group)
        self._draft_head_bits = lm_head_bits

    def draft(
        self,
        sequences: Sequence[int],
        tokens: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        check_tokens(tokens, self.vocab_size)
        self.prepare_drafts(rule.lm_head_bits)
        lengths = [self.length(sequence) for sequence in sequences]
        end = max(length + count for length, count in zip(lengths, most, strict=True))
        check_room(end, self.context_length)
        draft_head = rule.lm_head_bits != self.lm_head_bits
        if choose is None:
            with one_clear_line():
                self._positions.cover(end)
                drafts = self._core.draft(
                    sequences,
                    tokens,
                    most,
                    rule.exit_layer,
                    rule.least_margin,
                    list(rule.stop_tokens),
                    draft_head,
                )
            return [Draft(drafted, margins) for drafted, margins in zip(*drafts, strict=True)]
        thresholds = torch.tensor(ExitPolicy.fixed(rule.exit_layer).thresholds(self.num_layers))

        def decode(going: list[int], last: list[int]) -> Tensor:
            rows = range(len(going))
            step = Step(last, [sequences[i] for i in going], thresholds, rows)
            return self._forward(step, draft_head).logits

        try:
            return draft_step_by_step(decode, tokens, most, rule, choose)
        finally:
            for sequence, length in zip(sequences, lengths, strict=True):
                self.truncate(sequence, length)

    # ---- Offloading ----

    def offload_to(self, path: Path) -> None:
        """Evicted layers come back from this file, which holds the `packed_weights` one after the
        other.

        Raises:
            RiverError: it can't be opened, or has another size.
        """
        with one_clear_line():
            self._core.open_weights(str(path))

    @property
    def depth_limit(self) -> int | None:
        return self._depth_limit

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        check_depth_limit(limit, self.num_layers)
        self._depth_limit = limit

    @property
    def resident_layers(self) -> int:
        return int(self._core.resident_layers)

    def keep_layers(self, count: int) -> None:
        if not 0 <= count <= self.num_layers:
            raise ConfigError(
                f"{count} layers are to stay in memory; the model has {self.num_layers}"
            )
        with one_clear_line():
            self._core.keep_layers(count)

    @property
    def offload_statistics(self) -> OffloadStatistics:
        return OffloadStatistics(self.resident_layers, *self._core.offload_counts)

    @property
    def packed_weights(self) -> list[Any]:
        """The packed weights, uint8 arrays in the order of a file: of each backbone layer, None
        where it isn't in memory, then river and LM head. They are no copies, and are not to be
        touched after their layer was evicted."""
        return list(self._core.packed_weights)

    # ---- CacheAccess ----

    def cache_identity(self, token_ids: Sequence[int]) -> dict[str, str]:
        with one_clear_line():
            identity = native_identity(
                self._core, self.model, self.formats, self.embedding, token_ids
            )
        return {**identity, "depth limit": str(self._depth_limit)}

    def read_cache(self, sequence: int, length: int) -> dict[str, Tensor]:
        with one_clear_line():
            pages = self._core.read_pages(sequence, length)
        return {_page_name(index): torch.from_numpy(page) for index, page in enumerate(pages)}

    def write_cache(self, sequence: int, tensors: Mapping[str, Tensor], length: int) -> None:
        check_room(length, self.context_length)
        self.truncate(sequence, 0)
        pages = [tensors.get(_page_name(index)) for index in range(len(tensors))]
        if not all(page is not None and page.dtype is torch.uint8 for page in pages):
            raise RiverError("these are no pages of the native engine's KV cache")
        with one_clear_line():
            self._core.write_pages(
                sequence, [page.numpy() for page in pages if page is not None], length
            )

    # ---- what is measured ----

    def write_zeros(self, sequence: int, length: int) -> None:
        """As `write_cache`, with keys and values of zero: so memory and speed at length can be
        measured without computing a text."""
        positions = 64  # of a page
        page = torch.zeros(positions * self.position_bytes, dtype=torch.uint8)
        pages = range(-(-length // positions))
        self.write_cache(sequence, {_page_name(index): page for index in pages}, length)

    @property
    def head_bytes(self) -> int:
        """Of the LM head's packed weights."""
        return int(self._core.head_bytes)

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
        seen = sum(min(position, parts["window"] or position) for parts in self.model.layers)
        return int(weights + self._core.head_bytes + self._core.position_bytes * seen)


def _page_name(index: int) -> str:
    return f"page.{index:06}"
