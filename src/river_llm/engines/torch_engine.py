"""The reference engine: PyTorch eager, any decoder-only model of `transformers`, any device."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from river_llm.attachment import AttachedRiver
from river_llm.engines.cache_identity import torch_identity, torch_weights_digest
from river_llm.engines.drafting import (
    Choose,
    Draft,
    DraftRule,
    draft_step_by_step,
    likeliest_with_margin,
)
from river_llm.engines.engine import (
    StepResult,
    check_batch,
    check_room,
    check_sequences,
    check_token_ids,
    first_tokens,
)
from river_llm.engines.kv_cache import check_kv_bits, layer_class
from river_llm.engines.llama_family import angle_limit
from river_llm.errors import RiverError
from river_llm.exit_policy import ExitPolicy
from river_llm.exit_router import Phase
from river_llm.ownership import NotCopiedEngine, OwnProcess
from river_llm.residency import OffloadStatistics

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TorchEngine(NotCopiedEngine):
    """Decoding with a model that has a river attached; see `Engine` for the verbs.

    The cache keeps every token of every layer, also where a layer's attention only looks back over
    a sliding window, so that it can be truncated anywhere.
    """

    name = "torch"
    draft_head_bits: tuple[int, ...] = (16,)  # the model's own, whatever its dtype

    def __init__(self, attached: AttachedRiver, kv_bits: int = 16) -> None:
        """`kv_bits` are those of the KV cache: 16, whatever the model's dtype is, or 8.

        Raises:
            ConfigError: there is no cache of so many bits.
        """
        check_kv_bits(kv_bits)
        self.kv_bits = kv_bits
        self.attached = attached
        self.model = attached.model
        self.num_layers = attached.num_layers
        config = self.model.config.get_text_config(decoder=True)
        self.context_length: int | None = getattr(config, "max_position_embeddings", None)
        parameters = inspect.signature(self.model.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        self._last_logits_only = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        self._embedding_rows = embedding_rows(self.model)
        self.device = self.model.device
        self.draft_vocabularies: tuple[int, ...] = (config.vocab_size,)
        self.angle_limit = angle_limit(self.model)
        self.layer_bytes, self.rest_bytes = attached.weight_bytes()
        self._process = OwnProcess()
        self._weights_digest: str | None = None
        self._cache = self._new_cache()
        self._padding_mask: Tensor | None = None  # bool [batch, length]; None if all are real
        self._length = 0

    @property
    def setting(self) -> str:
        dtype = str(self.model.dtype).removeprefix("torch.")
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        cache = ", KV cache 8 bits" if self.kv_bits == 8 else ""
        return f"torch {self.device} {dtype}{threads}{cache}"

    @property
    def policy(self) -> ExitPolicy:
        return self.attached.policy

    @policy.setter
    def policy(self, policy: ExitPolicy) -> None:
        self.attached.policy = policy

    @property
    def record_similarities(self) -> bool:
        return self.attached.router.record_similarities

    @record_similarities.setter
    def record_similarities(self, record: bool) -> None:
        self.attached.router.record_similarities = record

    @property
    def depth_limit(self) -> int | None:
        return self.attached.depth_limit

    @depth_limit.setter
    def depth_limit(self, limit: int | None) -> None:
        self.attached.depth_limit = limit

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

    @property
    def length(self) -> int:
        return self._length

    @property
    def _batch(self) -> int:
        """Sequences in the cache."""
        return len(self._cache.layers[0].keys) if self._length else 0

    def prefill(self, token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        check_token_ids(token_ids, 2, self._embedding_rows)
        return self._run(token_ids, padding_mask, "prefill")

    def decode(self, token_ids: Tensor) -> StepResult:
        check_token_ids(token_ids, 1, self._embedding_rows)
        return self._run(token_ids.unsqueeze(1), None, "decode")

    def verify(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        limit = self.depth_limit
        if limit is not None and limit < self.num_layers:
            raise RiverError(
                f"verification needs the whole backbone, but tokens leave it after {limit} "
                "layers at the latest; take the depth limit off"
            )
        policy = self.policy
        self.policy = ExitPolicy.never()
        try:
            return self.score(token_ids, counts)
        finally:
            self.policy = policy

    def score(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        check_token_ids(token_ids, 2, self._embedding_rows)
        is_real = None if counts is None else first_tokens(counts, *token_ids.shape)
        result = self._run(token_ids, None, "decode", is_real, all_logits=True)
        if counts is not None:
            self.rewind([token_ids.shape[1] - count for count in counts])
        return result

    def prepare_drafts(self, lm_head_bits: int) -> None:
        del lm_head_bits

    def draft(
        self,
        token_ids: Sequence[int],
        most: Sequence[int],
        rule: DraftRule,
        choose: Choose | None = None,
    ) -> list[Draft]:
        policy, length = self.policy, self._length
        last = list(token_ids)

        def decode(sequences: list[int], tokens: list[int]) -> Tensor:
            for sequence, token in zip(sequences, tokens, strict=True):
                last[sequence] = token
            logits = self.decode(torch.tensor(last)).logits[sequences]  # the others run idle
            return logits[:, : rule.vocabulary]

        self.policy = ExitPolicy.fixed(rule.exit_layer)
        try:
            return draft_step_by_step(
                decode, token_ids, most, rule, choose or likeliest_with_margin
            )
        finally:
            self.policy = policy
            self.truncate(length)

    def rewind(self, counts: Sequence[int]) -> None:
        check_batch(self._batch, len(counts))
        self.truncate(self._length - min(counts))
        shifts = [count - min(counts) for count in counts]
        if not any(shifts):
            return
        # move the shorter sequences to the right, so that all end where the longest does
        mask = self._padding_mask
        if mask is None:
            mask = torch.ones(len(counts), self._length, dtype=torch.bool)
        mask = torch.stack([row.roll(shift) for row, shift in zip(mask, shifts, strict=True)])
        for row, shift in zip(mask, shifts, strict=True):
            row[:shift] = False
        unused = int(mask.any(0).long().argmax())  # columns that are padding everywhere
        for layer in self._cache.layers:
            layer.move(shifts, unused)
        self._leave_out(unused, mask)

    def keep_sequences(self, sequences: Sequence[int]) -> None:
        check_sequences(self._batch, sequences)
        mask = self._padding_mask
        if mask is None:
            mask = torch.ones(len(sequences), self._length, dtype=torch.bool)
        else:
            mask = mask[list(sequences)]
        unused = int(mask.any(0).long().argmax())  # columns that are padding everywhere
        for layer in self._cache.layers:
            layer.keep(sequences, unused)
        self._leave_out(unused, mask)

    def _leave_out(self, unused: int, mask: Tensor) -> None:
        """The first `unused` positions are gone; note it in the padding mask, which has them."""
        self._length -= unused
        mask = mask[:, unused:]
        self._padding_mask = None if bool(mask.all()) else mask

    def truncate(self, length: int) -> None:
        self._length = min(length, self._length)
        if self._length == 0:
            self._cache = self._new_cache()
            self._padding_mask = None
            return
        for layer in self._cache.layers:
            layer.truncate(self._length)
        if self._padding_mask is not None:
            self._padding_mask = self._padding_mask[:, : self._length]

    def cache_identity(self, token_ids: Sequence[int]) -> dict[str, str]:
        if self._weights_digest is None:  # else some of the weights may be evicted
            self._weights_digest = torch_weights_digest(self.model)
        identity = torch_identity(
            self.model, self._weights_digest, self.attached.matrices, self.kv_bits, token_ids
        )
        return {**identity, "depth limit": str(self.depth_limit)}

    def read_cache(self, length: int) -> dict[str, Tensor]:
        layers = self._cache.layers
        single = self._padding_mask is None and all(len(layer.keys) == 1 for layer in layers)
        if not single or not 0 < length <= self._length:
            raise RiverError(f"the KV cache holds no single sequence of {length} tokens")
        return {
            f"{name}.{index}": getattr(layer, name)[:, :, :length].to("cpu", copy=True).contiguous()
            for index, layer in enumerate(layers)
            for name in layer.parts
        }

    def write_cache(self, tensors: Mapping[str, Tensor], length: int) -> None:
        check_room(length, self.context_length)
        self.truncate(0)
        kind = layer_class(self.kv_bits)
        names = [f"{name}.{index}" for index in range(self.num_layers) for name in kind.parts]
        if set(names) != set(tensors) or not all(
            entries.ndim == 4 and entries.shape[0] == 1 and entries.shape[2] == length
            for entries in tensors.values()
        ):
            raise RiverError("this is no KV cache of the torch engine for this model")
        cache = self._new_cache()
        for index in range(self.num_layers):
            # copies: they may be mapped from a file that is replaced later
            parts = {
                name: tensors[f"{name}.{index}"].to(self.device, copy=True) for name in kind.parts
            }
            cache.layers.append(kind())
            cache.layers[index].restore(parts, self.model.dtype)
        self._cache, self._length = cache, length

    def _new_cache(self) -> Any:
        return Cache(layer_class_to_replicate=layer_class(self.kv_bits))

    @torch.no_grad()
    def _run(
        self,
        token_ids: Tensor,
        padding_mask: Tensor | None,
        phase: Phase,
        is_real: Tensor | None = None,
        all_logits: bool = False,
    ) -> StepResult:
        self._process.check()
        num_tokens = token_ids.shape[1]
        check_room(self._length + num_tokens, self.context_length)
        if self._length > 0:
            check_batch(self._batch, len(token_ids))
        inputs = self._inputs(token_ids, padding_mask)
        self.attached.phase, self.attached.is_real = phase, is_real
        length = self._length
        try:
            fewer_logits = {} if all_logits else self._last_logits_only
            output = self.model(
                past_key_values=self._cache, use_cache=True, **inputs, **fewer_logits
            )
            self._length = length + num_tokens
        finally:
            self.attached.phase = self.attached.is_real = None
            if self._length == length:  # cut short by an error or Ctrl-C: undo half a pass
                self.attached.abandon_pass()
                self._undo(length)
        similarities = self.attached.router.similarities  # [L, B, T] or None
        if all_logits:
            return StepResult(
                output.logits, self.attached.last_exit_layers, similarities=similarities
            )
        return StepResult(
            output.logits[:, -1],
            self.attached.last_exit_layers[:, -1],
            similarities=None if similarities is None else similarities[:, :, -1],
        )

    def _inputs(self, token_ids: Tensor, padding_mask: Tensor | None) -> dict[str, Any]:
        """Arguments of the model's forward."""
        if self._padding_mask is None and (padding_mask is None or bool(padding_mask.all())):
            return padded_inputs(token_ids.to(self.device), None, self._takes_position_ids)
        batch, num_tokens = token_ids.shape
        seen = self._padding_mask
        if seen is None:
            seen = torch.ones(batch, self._length, dtype=torch.bool)
        new = torch.ones(batch, num_tokens, dtype=torch.bool)
        self._padding_mask = torch.cat([seen, new if padding_mask is None else padding_mask], 1)
        return padded_inputs(
            token_ids.to(self.device), self._padding_mask, self._takes_position_ids
        )

    def _undo(self, length: int) -> None:
        self._length = length + 1  # some layers hold more than others: cut them all back
        self.truncate(length)


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model's embedding has."""
    return len(model.get_input_embeddings().weight)


def padded_inputs(
    token_ids: Tensor, padding_mask: Tensor | None, takes_position_ids: bool
) -> dict[str, Tensor]:
    """Arguments of a forward over tokens `[B, T]`; mask and positions only where there is padding.

    Args:
        padding_mask: bool `[B, positions]`, true for real tokens, of which the last T are these;
            None where there is no padding.
    """
    if padding_mask is None:
        return {"input_ids": token_ids}
    inputs = {"input_ids": token_ids, "attention_mask": padding_mask.to(token_ids)}
    if takes_position_ids:
        positions = padding_mask.long().cumsum(1).sub_(1).clamp_(min=0)
        inputs["position_ids"] = positions[:, -token_ids.shape[1] :].to(token_ids.device)
    return inputs
