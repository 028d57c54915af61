"""The exit policies that are worth trying on a model, by how its hidden states change."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from river_llm.river.policy import ExitPolicy

_SHARES = 0.1, 1 / 3, 2 / 3  # of the layers, beside none of them
_SECOND_LOOKS = 0.2, 0.3, 0.4  # margins
_BISECTIONS = 24
_DIGITS = 4  # of a threshold, where they decide anything


def candidate_policies(similarities: Tensor) -> list[ExitPolicy]:
    """Fixed depths, and thresholds by which tokens run as many layers in the mean: the paper's one
    for all layers, and one for each, the same quantile of what is seen there. And second looks, at
    tokens that never were in the backbone.

    Args:
        similarities: `[L, T]`, state transition similarities of tokens that ran the backbone.
    """
    num_layers = len(similarities)
    depths = sorted({round(share * num_layers) for share in _SHARES} - {0, num_layers})
    policies = [ExitPolicy.fixed(depth) for depth in (0, *depths)]
    policies += [ExitPolicy.fixed(0, second_look=margin) for margin in _SECOND_LOOKS]
    ascending = similarities.float().sort(1).values
    for depth in depths:
        for rule in (_one_threshold, lambda at: _thresholds_at(ascending, at)):
            policy = _of_mean_depth(rule, depth, similarities)
            if policy not in policies:
                policies.append(policy)
    return policies


def mean_depth(policy: ExitPolicy, similarities: Tensor) -> float:
    """How many layers tokens of these similarities `[L, T]` would run."""
    num_layers = len(similarities)
    thresholds = torch.tensor(policy.thresholds(num_layers)).unsqueeze(1)  # [L, 1]
    # entry l decides by the similarity of layer l; behind the last layer all leave
    leaves = torch.cat(
        [
            thresholds[:1].expand(1, similarities.shape[1]) < 0,
            similarities[:-1] > thresholds[1:],
            torch.ones(1, similarities.shape[1], dtype=torch.bool),
        ]
    )
    return float(leaves.int().argmax(0).float().mean())


def _of_mean_depth(
    rule: Callable[[float], ExitPolicy], depth: float, similarities: Tensor
) -> ExitPolicy:
    """The policy of a family, from 0 (leaves early) to 1 (late), whose mean depth comes near."""
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if mean_depth(rule(middle), similarities) < depth:
            low = middle
        else:
            high = middle
    return rule(high)


def _one_threshold(value: float) -> ExitPolicy:
    return ExitPolicy.similarity(round(value, _DIGITS))


def _thresholds_at(ascending: Tensor, level: float) -> ExitPolicy:
    """Each layer's threshold is this quantile of its similarities `[L, T]`, which are sorted."""
    place = round(level * (ascending.shape[1] - 1))
    values = ascending[:-1, place].tolist()
    return ExitPolicy.per_layer((math.inf, *(round(value, _DIGITS) for value in values)))
