"""A slow plain reference of early exit: whole models of `transformers`, and no river code.

A token that leaves after `e` layers is one that a model runs whose layers from `e` on are
quantised, on a KV cache that all of these models share.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from tiny_models import fake_quantised
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from river_llm import River


@torch.no_grad()
def layer_similarities(
    model: PreTrainedModel, tokens: Sequence[int], cache: DynamicCache | None = None
) -> Tensor:
    """Cosine of every layer's input and output, float64 `[L, T]`."""
    last: list[Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda *call: last.append(call[2]))
    output = model(torch.tensor([tokens]), output_hidden_states=True, past_key_values=cache)
    handle.remove()
    # transformers' last entry is behind the final norm
    states = torch.stack([*output.hidden_states[:-1], *last])[:, 0].double()
    before, after = states[:-1], states[1:]
    return (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)


@contextmanager
def quantised_from(
    model: PreTrainedModel, quantised: PreTrainedModel, exit_layer: int
) -> Iterator[PreTrainedModel]:
    """The model, whose layers from `exit_layer` on are those of the quantised one for a while."""
    layers = model.model.layers
    mixed = [*layers[:exit_layer], *quantised.model.layers[exit_layer:]]
    model.model.layers = nn.ModuleList(mixed)
    yield model
    model.model.layers = layers


@torch.no_grad()
def decode_with_exits(
    model: PreTrainedModel,
    river: River,
    tokens: Sequence[int],
    thresholds: Sequence[float],
    depth_limit: int | None = None,
    prompt_length: int = 0,
) -> tuple[Tensor, list[int]]:
    """Logits `[steps, V]` and exit layers of a prompt, which runs the backbone in one step, and of
    tokens that come one by one.

    Args:
        thresholds: entry l is what the similarity of layer l has to exceed; entry 0 isn't used.
        depth_limit: no token runs more backbone layers; the exit layers are those that they would
            have had.
    """
    num_layers = len(model.model.layers)
    quantised = fake_quantised(model, river)
    cache = DynamicCache()
    logits, exit_layers = [], []
    if prompt_length:
        prompt = torch.tensor([tokens[:prompt_length]])
        logits.append(model(prompt, past_key_values=cache).logits[0, -1])
        exit_layers.append(num_layers)
    for token in tokens[prompt_length:]:
        similarities = layer_similarities(model, [token], copy.deepcopy(cache))[:, 0].tolist()
        exceeding = [
            layer for layer in range(1, num_layers) if similarities[layer - 1] > thresholds[layer]
        ]
        exit_layers.append(exceeding[0] if exceeding else num_layers)
        depths = [exit_layers[-1], num_layers if depth_limit is None else depth_limit]
        with quantised_from(model, quantised, min(depths)) as variant:
            output = variant(torch.tensor([[token]]), past_key_values=cache)
        logits.append(output.logits[0, -1])
    return torch.stack(logits), exit_layers
