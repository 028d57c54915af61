"""The reference engine: PyTorch eager, any decoder-only model of `transformers`, any device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from river_llm.engines.cache_identity import torch_identity, torch_weights_digest
from river_llm.engines.kv_cache import check_kv_bits
from river_llm.engines.llama import rope_boundary
from river_llm.engines.sequence_cache import RowPlaces, SequenceCache, attention_mask
from river_llm.engines.step import Step, StepResult, check_room, check_tokens
from river_llm.errors import RiverError
from river_llm.ownership import NotCopiedEngine
from river_llm.river.attach import AttachedRiver
from river_llm.river.residency import OffloadStatistics
from river_llm.river.router import RoutingRule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FEW_ROWS = 16  # of a sequence: decoding and verification stay in one pass


class TorchEngine(NotCopiedEngine):
    """Steps of a model that has a river attached; see `Engine`, `Offloading` and `CacheAccess`.

    The sequences of a step run in one pass of the model, `[B, T]` tokens. Shorter sequences begin
    with padding, and those that have fewer rows in the step end with tokens that only fill the
    pass up; attention masks and positions hide both. Sequences whose rotary angles are of different
    texts (see `rope_boundary`) run in passes of their own, where a minimum group joins the rows of
    each pass.
    """

    name = "torch"
    prefill_rows: int | None = None

    def __init__(self, attached: AttachedRiver, kv_bits: int = 16) -> None:
        """`kv_bits` are those of the KV cache: 16, whatever the model's dtype is, or 8."""
        check_kv_bits(kv_bits)
        self.kv_bits = kv_bits
        self.attached = attached
        self.model = attached.model
        self.num_layers = attached.num_layers
        self.vocab_size = embedding_rows(self.model)
        config = self.model.config.get_text_config(decoder=True)
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        parameters = inspect.signature(self.model.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        self._takes_logit_columns = "logits_to_keep" in parameters
        self.device = self.model.device
        self.rope_boundary = rope_boundary(self.model)
        self._rotary_embeddings = [
            module for module in self.model.modules() if hasattr(module, "original_max_seq_len")
        ]
        self.layer_bytes, self.rest_bytes = attached.weight_bytes()
        dtype = str(self.model.dtype).removeprefix("torch.")
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        cache = ", KV cache 8 bits" if kv_bits == 8 else ""
        self.setting = f"torch {self.device} {dtype}{threads}{cache}"
        self._weights_digest: str | None = None
        self._cache = SequenceCache(self.num_layers, kv_bits)
        self._prompt_lengths: dict[int, int] = {}

    @property
    def depth_limit(self) -> int | None:
        return self.attached.router.depth_limit

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        self.attached.router.depth_limit = limit

    @property
    def resident_layers(self) -> int:
        return self.attached.resident_layers

    @property
    def offload_statistics(self) -> OffloadStatistics:
        return self.attached.offload_statistics

    def keep_layers(self, count: int) -> None:
        if self._weights_digest is None:
            self._weights_digest = torch_weights_digest(self.model)
        self.attached.keep_layers(count)

    def add_sequence(self, prompt_length: int = 0) -> int:
        sequence = next(number for number in count() if number not in self._cache.lengths)
        self._prompt_lengths[sequence] = prompt_length
        self._cache.lengths[sequence] = 0
        return sequence

    def drop_sequence(self, sequence: int) -> None:
        self._cache.drop(self._known(sequence))

    def truncate(self, sequence: int, length: int) -> None:
        self._cache.truncate(self._known(sequence), length)

    def length(self, sequence: int) -> int:
        return self._cache.lengths[self._known(sequence)]

    def sequences(self) -> list[int]:
        return sorted(self._cache.lengths)

    @torch.no_grad()
    def forward(self, step: Step) -> StepResult:
        rows = self._rows(step)
        groups = self._groups(rows, are_joined=bool(step.minimum_groups))
        passes = [self._run(step, {s: rows[s] for s in group}) for group in groups]
        lengths = {s: self.length(s) + len(of) for s, of in rows.items()}
        self._cache.lengths.update(lengths)  # not before all passes have come to their ends
        if len(passes) == 1:
            return passes[0][1]
        rows_of_passes = torch.cat([of_pass for of_pass, _ in passes])
        order = rows_of_passes.argsort()
        wanted = torch.isin(rows_of_passes, torch.tensor(step.logit_rows))
        similarities = [one.similarities for _, one in passes if one.similarities is not None]
        return StepResult(
            torch.cat([one.logits for _, one in passes])[rows_of_passes[wanted].argsort()],
            torch.cat([one.exit_layers for _, one in passes])[order],
            similarities=torch.cat(similarities, 1)[:, order] if similarities else None,
        )

    def _known(self, sequence: int) -> int:
        if sequence not in self._cache.lengths:
            raise RiverError(f"there is no sequence {sequence} in the engine's cache")
        return sequence

    def _rows(self, step: Step) -> dict[int, list[int]]:
        """The rows of each sequence of a step, which is validated."""
        check_tokens(step.tokens, self.vocab_size)
        rows: dict[int, list[int]] = {}
        for row, sequence in enumerate(step.sequences):
            rows.setdefault(self._known(sequence), []).append(row)
        for sequence, of in rows.items():
            check_room(self.length(sequence) + len(of), self.context_length)
        shape = tuple(step.thresholds.shape)
        if shape not in ((self.num_layers,), (len(step.tokens), self.num_layers)):
            raise RiverError(
                f"thresholds are {list(shape)}; give {self.num_layers}, one for each layer, for "
                "the whole step or for each of its rows"
            )
        return rows

    def _groups(self, rows: Mapping[int, Sequence[int]], are_joined: bool) -> list[list[int]]:
        """Sequences that run in one pass: those whose rotary angles are of one text, and whose rows
        are about as many, so that fillers are fewer than they."""
        groups: dict[tuple[int, int], list[int]] = {}
        for sequence in sorted(rows):
            count = len(rows[sequence])
            angles = self._angles(self._text_length(sequence, count))
            size = 0 if count <= _FEW_ROWS or are_joined else (count - 1).bit_length()
            groups.setdefault((angles, size), []).append(sequence)
        return list(groups.values())

    def _text_length(self, sequence: int, new: int) -> int:
        return max(self._prompt_lengths[sequence], self.length(sequence) + new)

    def _angles(self, length: int) -> int:
        """The least length of a text with the same rotary angles as one of this length."""
        boundary = self.rope_boundary
        if boundary is None or length <= boundary.positions:
            return 0
        return length if boundary.keep_changing else boundary.positions + 1

    def _run(self, step: Step, rows: Mapping[int, Sequence[int]]) -> tuple[Tensor, StepResult]:
        """One pass of the model over the rows of some sequences: these rows, ascending, and what
        came of them."""
        batch, past = self._cache.aligned(list(rows), apart_from=set(step.sequences) - set(rows))
        text_length = max(self._text_length(s, len(of)) for s, of in rows.items())
        end = max(self.length(s) + len(of) for s, of in rows.items())
        lengthens = self._angles(end) != self._angles(text_length)
        places = RowPlaces.of(batch.sequences, rows, int(lengthens))
        tokens = torch.tensor(step.tokens)[places.step_rows]
        inputs: dict[str, Any] = {"input_ids": tokens.to(self.device)}
        if any(batch.starts) or not bool(places.is_real.all()):
            mask = attention_mask(batch, self._cache.lengths, past, places.is_real)
            inputs["attention_mask"] = mask.to(inputs["input_ids"])
            if self._takes_position_ids:
                positions = (mask.long().cumsum(1) - 1)[:, past:] * places.is_real
                if lengthens:  # the angles are those of the furthest position
                    positions[0, -1] = self._angles(text_length) - 1
                inputs["position_ids"] = positions.to(self.device)
        wanted = torch.isin(places.rows, torch.tensor(step.logit_rows))
        sequences, columns = places.sequences[wanted], places.columns[wanted]
        kept = torch.arange(tokens.shape[1])
        if self._takes_logit_columns:
            kept = columns.unique() if len(columns) else kept[-1:]  # type: ignore[no-untyped-call]
            inputs["logits_to_keep"] = kept.to(self.device)
        self._reset_angles()
        with self.attached.routed_by(_rule(step, places)):
            output = self.model(past_key_values=batch.cache, use_cache=True, **inputs)
        router = self.attached.router
        at = places.sequences, places.columns
        similarities = router.similarities
        return places.rows, StepResult(
            output.logits[sequences, torch.searchsorted(kept, columns)],
            router.exit_layers[at],
            similarities=None if similarities is None else similarities[:, at[0], at[1]],
        )

    def _reset_angles(self) -> None:
        """Let the rotary embeddings forget the longest text that they have seen."""
        if self.rope_boundary is None or not self.rope_boundary.keep_changing:
            return
        zero = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        for rotary in self._rotary_embeddings:
            for layer_type in getattr(rotary, "layer_types", None) or [None]:
                rotary(zero.float(), zero, *[layer_type][: layer_type is not None])

    def cache_identity(self, token_ids: Sequence[int]) -> dict[str, str]:
        if self._weights_digest is None:  # else some of the weights may be evicted
            self._weights_digest = torch_weights_digest(self.model)
        identity = torch_identity(
            self.model, self._weights_digest, self.attached.matrices, self.kv_bits, token_ids
        )
        return {**identity, "depth limit": str(self.depth_limit)}

    def read_cache(self, sequence: int, length: int) -> dict[str, Tensor]:
        if not 0 < length <= self.length(sequence):
            raise RiverError(f"sequence {sequence} has no {length} tokens in the KV cache")
        return self._cache.read(sequence, length)

    def write_cache(self, sequence: int, tensors: Mapping[str, Tensor], length: int) -> None:
        check_room(length, self.context_length)
        like = next(self.model.parameters())
        self._cache.write(self._known(sequence), tensors, length, like)


def _rule(step: Step, places: RowPlaces) -> RoutingRule:
    """The routing of a pass over rows of a step."""

    def of_tokens(groups: Sequence[int]) -> Tensor | None:
        return torch.tensor(groups)[places.step_rows] if groups else None

    thresholds = step.thresholds
    return RoutingRule(
        thresholds if thresholds.ndim == 1 else thresholds[places.step_rows],
        None if bool(places.is_real.all()) else places.is_real,
        of_tokens(step.mean_groups),
        of_tokens(step.minimum_groups),
        step.record_similarities,
    )


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model's embedding has."""
    return len(model.get_input_embeddings().weight)
