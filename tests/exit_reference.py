"""A slow plain reference of early exit: whole models of `transformers`, and no river code.

`variants[e]` is the model whose layers from `e` on are quantised, so a token that leaves after `e`
layers is a token that `variants[e]` runs, on a KV cache that all of them share.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from tiny_models import fake_quantised
from torch import Tensor
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


@torch.no_grad()
def decode_with_exits(
    model: PreTrainedModel,
    river: River,
    tokens: Sequence[int],
    thresholds: Sequence[float],
    depth_limit: int | None = None,
) -> tuple[Tensor, list[int]]:
    """Logits `[T, V]` and exit layers of tokens that come one by one.

    Args:
        thresholds: entry l is what the similarity of layer l has to exceed; entry 0 isn't used.
        depth_limit: no token runs more backbone layers; the exit layers are those that they would
            have had.
    """
    num_layers = len(model.model.layers)
    variants = [fake_quantised(model, river, layer) for layer in range(num_layers)] + [model]
    cache = DynamicCache()
    logits, exit_layers = [], []
    for token in tokens:
        similarities = layer_similarities(model, [token], copy.deepcopy(cache))[:, 0].tolist()
        exceeding = [
            layer for layer in range(1, num_layers) if similarities[layer - 1] > thresholds[layer]
        ]
        exit_layers.append(exceeding[0] if exceeding else num_layers)
        depths = [exit_layers[-1], num_layers if depth_limit is None else depth_limit]
        variant = variants[min(depths)]
        logits.append(variant(torch.tensor([[token]]), past_key_values=cache).logits[0, -1])
    return torch.stack(logits), exit_layers
