"""A slow plain reference of the strategies: the whole text in one pass of `transformers`, without a
cache, layer by layer as the strategy is defined.

All positions run every layer. A token that has left keeps its hidden state where later tokens are
to see that (state propagation) or aren't to see it at all (KV mask, by the attention mask); where
missing entries are computed after all (KV recompute) or never needed (monotonic exit), it just goes
on, and its output is taken from where it left.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from river_llm.river.backbone import decoder_layers


@torch.no_grad()
def run_text(
    model: PreTrainedModel,
    strategy: str,
    token_ids: Sequence[int],
    thresholds: Sequence[Sequence[float] | None],
) -> tuple[Tensor, list[int]]:
    """Logits `[T, V]` and exit layers of a text's tokens.

    Args:
        model: without anything on it, with eager attention.
        thresholds: of each token, one for each number of layers run; None: it is of a prompt, which
            runs them all.
    """
    layers = [layer.module for layer in decoder_layers(model)]
    num_tokens, num_layers = len(token_ids), len(layers)
    exit_layers = [num_layers] * num_tokens
    at_exit: list[Tensor | None] = [None] * num_tokens

    def has_left(token: int) -> bool:
        return at_exit[token] is not None

    def let_leave(layers_run: int, states: Tensor, similarities: Tensor) -> None:
        for token, of_token in enumerate(thresholds):
            if has_left(token) or of_token is None or layers_run == num_layers:
                continue
            leaves = of_token[layers_run] == -math.inf
            leaves |= float(similarities[token]) > of_token[layers_run]
            if strategy == "monotonic" and token > 0:
                leaves |= exit_layers[token - 1] <= layers_run
            if leaves:
                exit_layers[token], at_exit[token] = layers_run, states[token]

    def before(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if index == 0:
                let_leave(0, _hidden(args, kwargs)[0], torch.full((num_tokens,), -math.inf))
            if strategy != "mask":
                return None
            missing = torch.tensor([has_left(token) for token in range(num_tokens)])
            masked = [_masked(value, missing) for value in args]
            return tuple(masked), {name: _masked(value, missing) for name, value in kwargs.items()}

        return hook

    def after(index: int) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            before, states = _hidden(args, kwargs)[0], (output[0] if is_tuple else output)[0]
            states = states.clone()
            is_last = index + 1 == num_layers
            if strategy in ("mask", "propagate") or is_last:
                for token, kept in enumerate(at_exit):
                    if kept is not None:
                        states[token] = kept
            similarities = nn.functional.cosine_similarity(before, states, dim=-1)
            let_leave(index + 1, states, similarities)
            return (states[None], *output[1:]) if is_tuple else states[None]

        return hook

    handles = []
    for index, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(layer.register_forward_hook(after(index), with_kwargs=True))
    try:
        logits = model(torch.tensor([list(token_ids)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return logits, exit_layers


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states


def _masked(value: Any, missing: Tensor) -> Any:
    """An attention mask `[1, heads, T, T]` with the missing keys hidden; anything else as it is."""
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[-1] != len(missing):
        return value
    hidden = True if value.dtype == torch.bool else torch.finfo(value.dtype).min  # bool: only MPT's
    return value.masked_fill(missing, hidden)
