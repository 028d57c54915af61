"""What the layers do along a text: similarity, K and V cosine, and where tokens leave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from river_llm.attachment import AttachedRiver
from river_llm.engines import Engine
from river_llm.exit_policy import ExitPolicy
from river_llm.inspection import inspect_text

_EARLY_SHARE = 4  # the first quarter of the layers is early
_QUANTILES = (0.1, 0.5, 0.9)
_POINTS = 2000  # of a scatter that are kept


def windows_of(token_ids: Sequence[int], window: int, count: int) -> list[list[int]]:
    """The first windows of a text, all of one length; one shorter window where it has no more."""
    whole = [list(token_ids[i * window : (i + 1) * window]) for i in range(count)]
    return [one for one in whole if len(one) == window] or whole[:1]


def read_layers(attached: AttachedRiver, windows: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Similarity of each layer, K and V cosine, and how early similarity predicts the last layer's
    values, over all tokens but the first of each window.

    Returns:
        plain JSON values. ``early_correlation`` is Pearson's r between a token's mean similarity in
        the first quarter of the layers and its value cosine (river alone against backbone alone) in
        the last layer; ``correlation_by_layer`` the same for each layer's similarity. None where
        one of the two doesn't vary.
    """
    read = [inspect_text(attached, window) for window in windows]
    similarities = torch.cat([one.similarities[:, 1:] for one in read], 1).double()  # [L, N]
    values = torch.cat([one.final_value_cosine for one in read]).double()  # [N]
    early = similarities[: max(1, len(similarities) // _EARLY_SHARE)].mean(0)
    levels = similarities.new_tensor(_QUANTILES)
    quantiles = similarities.quantile(levels, dim=1)  # [3, L]
    step = max(1, -(-values.numel() // _POINTS))
    return {
        "tokens": values.numel(),
        "similarity_quantiles": dict(zip(map(str, _QUANTILES), quantiles.tolist(), strict=True)),
        "key_cosine": torch.stack([one.key_cosine for one in read]).mean(0).tolist(),
        "value_cosine": torch.stack([one.value_cosine for one in read]).mean(0).tolist(),
        "early_layers": max(1, len(similarities) // _EARLY_SHARE),
        "early_correlation": _pearson(early, values),
        "correlation_by_layer": [_pearson(layer, values) for layer in similarities],
        "early_similarity": early[::step].tolist(),
        "final_value_cosine": values[::step].tolist(),
    }


def read_exits(
    engine: Engine, policies: Mapping[str, ExitPolicy], windows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Where each token of a text leaves by each policy, as decoding would take it.

    Returns:
        for each policy `exit_layers`, a list for each window.
    """
    before = engine.policy
    exits: dict[str, Any] = {}
    try:
        for name, policy in policies.items():
            engine.policy = replace(policy, prefill="token")
            exits[name] = []
            for window in windows:
                engine.truncate(0)
                step = engine.score(torch.tensor([list(window)]))
                exits[name].append(step.exit_layers[0].tolist())
    finally:
        engine.truncate(0)
        engine.policy = before
    return exits


def _pearson(first: Tensor, second: Tensor) -> float | None:
    if first.numel() < 2:
        return None
    found = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    return found if -1.5 < found < 1.5 else None  # not NaN
