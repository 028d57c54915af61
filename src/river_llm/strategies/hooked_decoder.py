"""A model's decoder whose layers are called by other hands.

In the place of every decoder layer's `forward` stands a function that is given what the decoder
gives the layer and answers with hidden states: the layer's own, or its input where the layer is
skipped. Embeddings, positions, masks, final norm and LM head stay the model's doing. So do the
arguments of a layer for other tokens than those of the running pass: the decoder itself is asked
for them, with layers that only take note (`arguments`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from river_llm.attachment import ATTACHED
from river_llm.backbone import check_plain_decoder, decoder_layers, text_decoder
from river_llm.engines.torch_engine import padded_inputs
from river_llm.errors import RiverError, UnsupportedModelError
from river_llm.ownership import NotCopied
from river_llm.strategies.slot_cache import EntriesWritten, Place, SlotCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SAME = 0.05  # relative error that rounding to bfloat16 stays far below


@dataclass(frozen=True, slots=True)
class LayerCall:
    """The arguments of a layer's `forward`; the first of `args` are its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# (layer, counted from 0, hidden states [B, T, C], its call) -> hidden states [B, T, C]
OnLayer = Callable[[int, Tensor, LayerCall], Tensor]


class HookedDecoder(NotCopied):
    """The decoder layers of a model, until `detach` gives them back.

    Attributes:
        model: of `transformers`.
        layers: its decoder layers.
        on_layer: what runs in the place of a layer.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """
        Raises:
            UnsupportedModelError: the model is no plain decoder, or a layer needs to know more of a
                token than its arguments say.
            RiverError: there is a river or another strategy on the model.
        """
        if hasattr(model, ATTACHED):
            raise RiverError(
                "the model has a river or an exit strategy already; call detach_river(model) first"
            )
        self.model = model
        self.layers = decoder_layers(model)
        check_plain_decoder(model, self.layers)
        self._decoder = text_decoder(model)
        parameters = inspect.signature(self._decoder.forward).parameters
        self._takes_position_ids = "position_ids" in parameters
        self._forwards = [layer.module.forward for layer in self.layers]
        self._names = list(inspect.signature(self._forwards[0]).parameters)
        self._notes: list[LayerCall] | None = None
        self._output_size: int | None = None  # of a tuple; None: a layer gives a tensor
        self._attended: Any = None  # what a mask holds for an entry that is attended to
        self._hidden: Any = None  # and for one that isn't; None: there are no such masks
        self._mask_dtype = torch.bool
        self.on_layer: OnLayer = self.run
        for index, layer in enumerate(self.layers):
            layer.module.forward = self._forward_of(index)
        setattr(model, ATTACHED, self)
        try:
            self._look_at_a_pass()
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Give the layers back; the model is then what it was."""
        for layer in self.layers:
            for module in (layer.module, *layer.linears.values()):
                module.__dict__.pop("forward", None)
        if getattr(self.model, ATTACHED, None) is self:
            delattr(self.model, ATTACHED)

    def run(
        self, index: int, hidden_states: Tensor, call: LayerCall, missing: Tensor | None = None
    ) -> Tensor:
        """What a layer makes of hidden states `[B, T, C]`.

        Args:
            missing: bool `[B, positions]`, entries that are not to be attended to.
        """
        if missing is not None:
            call = self._hiding(call, missing)
        output = self._forwards[index](hidden_states, *call.args[1:], **call.kwargs)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def write_entries(
        self, index: int, hidden_states: Tensor, call: LayerCall, cache: SlotCache
    ) -> None:
        """Have a layer write the keys and values of hidden states `[B, T, C]`, and no more."""
        cache.entries_only = True
        try:
            self.run(index, hidden_states, call)
        except EntriesWritten:
            pass
        finally:
            cache.entries_only = False

    def arguments(
        self, token_ids: Tensor, padding_mask: Tensor | None, cache: SlotCache
    ) -> list[LayerCall]:
        """What the decoder gives each of its layers for tokens `[B, T]` at the cache's place.

        Args:
            padding_mask: bool `[B, positions]`, true for real tokens; None where all are.
        """
        notes: list[LayerCall] = []
        self._notes = notes
        try:
            inputs = padded_inputs(token_ids, padding_mask, self._takes_position_ids)
            self._decoder(past_key_values=cache, use_cache=True, **inputs)
        finally:
            self._notes = None
        return notes

    def check_hides_entries(self) -> None:
        """See that entries can be hidden from a layer's attention.

        Raises:
            UnsupportedModelError: its layers are given no mask of queries and keys.
        """
        if self._hidden is None:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives its layers no attention mask of queries and "
                "keys, which the strategy mask needs; load it with attn_implementation sdpa or "
                "eager, or take another strategy"
            )

    def _forward_of(self, index: int) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not args:
                args = (kwargs.pop(self._names[0]),)
            hidden_states: Tensor = args[0]
            call = LayerCall(args, kwargs)
            if self._notes is not None:
                self._notes.append(call)
            else:
                hidden_states = self.on_layer(index, hidden_states, call)
            if self._output_size is None:
                return hidden_states
            return (hidden_states, *[None] * (self._output_size - 1))

        return forward

    def _mask_argument(self, call: LayerCall) -> int | None:
        """Its place among the positional arguments; None: it is a keyword's."""
        place = self._names.index("attention_mask") if "attention_mask" in self._names else None
        return place if place is not None and place < len(call.args) else None

    def _mask(self, call: LayerCall) -> Tensor | None:
        place = self._mask_argument(call)
        return call.kwargs.get("attention_mask") if place is None else call.args[place]

    def _hiding(self, call: LayerCall, missing: Tensor) -> LayerCall:
        """The same call, with `missing` entries hidden."""
        mask = self._mask(call)
        missing = missing[:, None, None, :]  # [B, 1, 1, positions]
        if mask is None:  # the decoder leaves it to attention: each token sees all up to itself
            num_tokens, positions = call.args[0].shape[1], missing.shape[-1]
            mask = missing.new_full(
                (len(missing), 1, num_tokens, positions), self._attended, dtype=self._mask_dtype
            )
            later = torch.ones_like(mask, dtype=torch.bool).triu(positions - num_tokens + 1)
            mask = mask.masked_fill(later, self._hidden)
        mask = mask.masked_fill(missing, self._hidden)
        place = self._mask_argument(call)
        if place is None:
            return LayerCall(call.args, {**call.kwargs, "attention_mask": mask})
        return LayerCall((*call.args[:place], mask, *call.args[place + 1 :]), call.kwargs)

    @torch.no_grad()
    def _look_at_a_pass(self) -> None:
        """Learn how layers answer and what masks hold, from a pass of two rows, one of them padded;
        and see that the first layer makes the same of some of its tokens alone."""
        device = self.model.get_input_embeddings().weight.device
        token_ids = torch.arange(6, device=device).view(2, 3)
        padding_mask = torch.tensor([[False, True, True], [True, True, True]])
        cache = SlotCache(len(self.layers), batch=2)
        seen: list[tuple[Tensor, LayerCall, Tensor]] = []

        def on_layer(index: int, hidden_states: Tensor, call: LayerCall) -> Tensor:
            if index == 0:
                output = self._forwards[0](*call.args, **call.kwargs)
                if isinstance(output, tuple):
                    self._output_size, output = len(output), output[0]
                seen.append((hidden_states, call, output))
            return hidden_states

        self.on_layer = on_layer
        cache.place = Place(0, 3)
        self._decoder(
            past_key_values=cache,
            use_cache=True,
            **padded_inputs(token_ids, padding_mask, self._takes_position_ids),
        )
        self.on_layer = self.run
        ((hidden_states, call, output),) = seen
        mask = self._mask(call)
        if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[-2:] == (3, 3):
            if mask.dtype == torch.bool:
                self._attended, hidden = mask[0, 0, -1, -1].item(), mask[0, 0, -1, 0].item()
                self._hidden = hidden if hidden != self._attended else None
            elif float(mask[0, 0, -1, 0]) <= torch.finfo(mask.dtype).min / 2:
                self._attended, self._hidden = 0.0, torch.finfo(mask.dtype).min
            self._mask_dtype = mask.dtype

        cache.place = Place(1, 3, rows=torch.tensor([1], device=device))
        (alone, *_) = self.arguments(token_ids[1:, 1:], padding_mask[1:], cache)
        piece = self.run(0, hidden_states[1:, 1:], alone)
        expected = output[1:, 1:]
        if float((piece - expected).norm()) > _SAME * float(expected.norm()):
            raise UnsupportedModelError(
                f"{type(self.model).__name__}: its layers make something else of a token alone "
                "than of the same token in a batch; exit strategies can't run on it"
            )
