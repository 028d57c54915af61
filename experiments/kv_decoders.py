"""One sequence on a model of `transformers`, token by token: the strategies of `kv_strategies`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from river_llm import ExitPolicy, River, attach_river, detach_river
from river_llm.river.backbone import decoder_layers, text_decoder


class RiverDecoder:
    """A token goes on through the exit layers.

    Decoders are entered (`with`) while they run; `begin` forgets all before and runs a prompt
    through the whole backbone, `step` appends a token, which may leave; both give logits
    `[vocabulary]`, and `exit_layer` says how many layers the last token ran.
    """

    def __init__(self, model: PreTrainedModel, river: River, policy: ExitPolicy) -> None:
        self.exit_layer = 0
        self._model, self._river, self._policy = model, river, policy

    def __enter__(self) -> RiverDecoder:
        self._attached = attach_river(self._model, self._river, policy=self._policy)
        return self

    def __exit__(self, *_: object) -> None:
        detach_river(self._model)

    def begin(self, prompt: Sequence[int]) -> Tensor:
        self._cache = DynamicCache()
        return self._run(prompt)

    def step(self, token: int) -> Tensor:
        return self._run([token])

    @torch.no_grad()
    def _run(self, tokens: Sequence[int]) -> Tensor:
        logits = run_model(self._model, tokens, self._cache, self._cache.get_seq_length())
        self.exit_layer = int(self._attached.last_exit_layers[0, -1])
        return logits


class NoExit:
    """No token leaves; the base of strategies without a river. Used as `RiverDecoder` is.

    Every layer's `forward` is replaced while it is entered: it runs, or hands its input on. The
    cache of a layer holds the tokens that ran it. Their keys carry their positions, so attention
    over what is there needs no mask.
    """

    def __init__(self, model: PreTrainedModel, thresholds: Sequence[float]) -> None:
        """
        Args:
            thresholds: `[L]`, see `ExitPolicy.thresholds`.
        """
        check_model(model)
        self.model = model
        self.layers = [layer.module for layer in decoder_layers(model)]
        self.num_layers = self.exit_layer = len(self.layers)
        self.thresholds = thresholds
        self.length = 0

    def __enter__(self) -> NoExit:
        for index, layer in enumerate(self.layers):
            layer.forward = partial(self._layer, index, layer.forward)
        return self

    def __exit__(self, *_: object) -> None:
        for layer in self.layers:
            del layer.forward

    def begin(self, prompt: Sequence[int]) -> Tensor:
        self.cache = DynamicCache()
        self.length = 0
        self.exit_layer = self.num_layers
        self._is_prompt = True
        return self._run(prompt)

    def step(self, token: int) -> Tensor:
        self.before_step()
        self._is_prompt = False
        self.exit_layer = 0 if self.leaves(0, -math.inf) else self.num_layers
        return self._run([token])

    def before_step(self) -> None:
        """`exit_layer` is that of the token before."""

    def leaves(self, layers_run: int, similarity: float) -> bool:
        """Whether the token leaves here."""
        return False

    def run(
        self, index: int, forward: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        """A layer for the token, hidden state `[1, 1, C]`, while it is in the backbone."""
        return forward(hidden, **kwargs)

    def skip(
        self, index: int, forward: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        """A layer that the token doesn't run, after it left with this hidden state."""

    @torch.no_grad()
    def _run(self, tokens: Sequence[int]) -> Tensor:
        logits = run_model(self.model, tokens, self.cache, self.length)
        self.length += len(tokens)
        return logits

    def _layer(
        self, index: int, forward: Callable[..., Tensor], hidden: Tensor, **kwargs: Any
    ) -> Tensor:
        if self._is_prompt:
            return forward(hidden, **kwargs)
        kwargs["attention_mask"] = None  # nothing that is in this layer's cache is hidden
        if self.exit_layer <= index:
            self.skip(index, forward, hidden, kwargs)
            return hidden
        output = self.run(index, forward, hidden, kwargs)
        layers_run = index + 1
        if layers_run < self.num_layers:
            similarity = float(nn.functional.cosine_similarity(hidden[0, 0], output[0, 0], dim=0))
            if self.leaves(layers_run, similarity):
                self.exit_layer = layers_run
        return output


class KVMask(NoExit):
    """Skipped layers hold nothing for the token."""

    def leaves(self, layers_run: int, similarity: float) -> bool:
        threshold = self.thresholds[layers_run]
        return threshold == -math.inf or similarity > threshold


class MonotonicExit(KVMask):
    """A token leaves where the thresholds say, at the latest where the one before it left."""

    _limit = 0

    def before_step(self) -> None:
        self._limit = self.exit_layer

    def leaves(self, layers_run: int, similarity: float) -> bool:
        return layers_run >= self._limit or super().leaves(layers_run, similarity)


class StatePropagation(KVMask):
    """A skipped layer runs until its keys and values are cached, on the hidden state at the exit.

    Its query projection is left out where it is a linear layer of its own.
    """

    def skip(
        self, index: int, forward: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        query = getattr(getattr(self.layers[index], "self_attn", None), "q_proj", None)
        if query is not None:
            query.forward = lambda inputs: inputs.new_zeros(1, 1, query.out_features)
        try:
            forward(hidden, **{**kwargs, "past_key_values": _WriteOnly(self.cache)})
        except _Written:
            return
        finally:
            if query is not None:
                del query.forward


class _Written(Exception):  # noqa: N818  # not an error
    """A layer's keys and values are cached; the rest of it isn't wanted."""


class _WriteOnly:
    """A cache that ends a layer once it has its keys and values."""

    def __init__(self, cache: DynamicCache) -> None:
        self._cache = cache

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._cache.update(*args, **kwargs)
        raise _Written


class KVRecompute(KVMask):
    """Tokens that left wait with their hidden states until a later one comes to the next layer.

    So when a token has run a layer, all before it have. The depths of those that wait fall along
    the text, and those that wait before a layer are the last ones.
    """

    def begin(self, prompt: Sequence[int]) -> Tensor:
        self._waiting: list[Tensor] = []  # hidden states [1, 1, C], of the last tokens
        self._depths: list[int] = []  # layers that they ran
        return super().begin(prompt)

    def run(
        self, index: int, forward: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]
    ) -> Tensor:
        first = sum(depth > index for depth in self._depths)
        behind = len(self._depths) - first
        if not behind:
            return forward(hidden, **kwargs)
        states = torch.cat([*self._waiting[first:], hidden], 1)
        rotary: Any = text_decoder(self.model).rotary_emb
        positions = torch.arange(self.length - behind, self.length + 1).unsqueeze(0)
        kwargs["position_ids"] = positions.to(hidden.device)
        kwargs["position_embeddings"] = rotary(states, kwargs["position_ids"])
        # each row sees what the layer holds already, and the rows up to its own
        seen = torch.ones(behind + 1, self.length + 1, dtype=torch.bool)
        seen = seen.tril(self.length - behind)
        kwargs["attention_mask"] = seen[None, None].to(hidden.device)
        output = forward(states, **kwargs)
        self._waiting[first:] = torch.split(output[:, :-1], 1, 1)
        self._depths[first:] = [index + 1] * behind
        return output[:, -1:]

    def skip(
        self, index: int, forward: Callable[..., Tensor], hidden: Tensor, kwargs: dict[str, Any]
    ) -> None:
        if index == self.exit_layer:  # once for each token
            self._left = hidden

    @torch.no_grad()
    def _run(self, tokens: Sequence[int]) -> Tensor:
        logits = super()._run(tokens)
        done = sum(depth == self.num_layers for depth in self._depths)  # the first ones
        del self._waiting[:done], self._depths[:done]
        if self.exit_layer < self.num_layers:
            self._waiting.append(self._left)
            self._depths.append(self.exit_layer)
        return logits


Decoder = RiverDecoder | NoExit

STRATEGIES: dict[str, type[NoExit]] = {
    "mask": KVMask,
    "recompute": KVRecompute,
    "propagate": StatePropagation,
    "monotonic": MonotonicExit,
}


def check_model(model: PreTrainedModel) -> None:
    """Validate that the strategies can run a model.

    Raises:
        SystemExit: they can't.
    """
    config = model.config.get_text_config(decoder=True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_full = kinds == {"full_attention"} and not getattr(config, "sliding_window", None)
    has_rotary = hasattr(text_decoder(model), "rotary_emb")
    if not (is_full and has_rotary and config._attn_implementation == "sdpa"):
        raise SystemExit(
            f"{type(model).__name__}: the strategies need rotary angles, full attention in every "
            "layer and attn_implementation='sdpa'"
        )


def run_model(
    model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache, start: int
) -> Tensor:
    """A pass of the model over tokens that begin at a position. Logits `[vocabulary]`."""
    positions = torch.arange(start, start + len(tokens), device=model.device).unsqueeze(0)
    logits: Tensor = model(
        input_ids=torch.tensor([list(tokens)], device=model.device),
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    ).logits
    return logits[0, -1]


def follow(decoder: Decoder, text: Sequence[int]) -> tuple[Tensor, list[int], list[float]]:
    """Decode along a text, whose first token is the prompt.

    Returns:
        Logits `[tokens - 1, vocabulary]` that predict the others, and of all tokens but the last
        how many layers it ran and its seconds.
    """
    logits, exit_layers, seconds = [], [], []
    for place, token in enumerate(text[:-1]):
        start = time.perf_counter()
        found = decoder.begin([token]) if place == 0 else decoder.step(token)
        found.argmax().item()  # on an accelerator: wait for it
        seconds.append(time.perf_counter() - start)
        logits.append(found)
        exit_layers.append(decoder.exit_layer)
    return torch.stack(logits), exit_layers, seconds


def generate(decoder: Decoder, prompt: Sequence[int], count: int) -> list[int]:
    """The greedy answer of a prompt, `count` tokens."""
    answer = [int(decoder.begin(prompt).argmax())]
    while len(answer) < count:
        answer.append(int(decoder.step(answer[-1]).argmax()))
    return answer
