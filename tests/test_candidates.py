"""The exit policies that are tried on a model."""

from __future__ import annotations

import math

import pytest
import torch

from river_llm import ExitPolicy
from river_llm.measure.candidates import candidate_policies, mean_depth

NUM_LAYERS = 12


def similarities() -> torch.Tensor:
    """Every layer has a range of its own, the third a high one."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.linspace(0.3, 0.9, NUM_LAYERS).unsqueeze(1)
    centres[2] = 0.95
    return centres + 0.05 * torch.rand(NUM_LAYERS, 500, generator=generator)


def depth_of(thresholds: tuple[float, ...], of_token: list[float]) -> int:
    """Plainly, layer after layer."""
    if thresholds[0] == -math.inf:
        return 0
    for layer in range(1, NUM_LAYERS):
        if of_token[layer - 1] > thresholds[layer]:
            return layer
    return NUM_LAYERS


@pytest.mark.parametrize(
    "policy",
    [
        ExitPolicy.never(),
        ExitPolicy.always(),
        ExitPolicy.fixed(5),
        ExitPolicy.similarity(0.62),
        ExitPolicy.similarity(0.7, first_layer=4),
        ExitPolicy.per_layer((math.inf, *[0.34, 0.4, 0.98, math.inf, 0.55] * 2, 0.9)),
    ],
)
def test_a_mean_depth_is_that_of_single_tokens(policy: ExitPolicy) -> None:
    seen, thresholds = similarities(), policy.thresholds(NUM_LAYERS)
    depths = [depth_of(thresholds, seen[:, token].tolist()) for token in range(seen.shape[1])]
    assert mean_depth(policy, seen) == pytest.approx(sum(depths) / len(depths))


def test_rules_are_tried_at_the_depths_of_fixed_exits() -> None:
    seen = similarities()
    policies = candidate_policies(seen)
    depths = [policy.exit_layer for policy in policies if policy.kind == "fixed"]
    assert depths == [0, 1, 4, 8, 0, 0, 0]
    assert [policy.second_look for policy in policies if policy.second_look] == [0.2, 0.3, 0.4]
    kinds = [policy.kind for policy in policies]
    assert (kinds.count("similarity"), kinds.count("thresholds")) == (3, 3)
    for depth, policy in zip((1, 4, 8), policies[8::2], strict=True):
        assert policy.kind == "thresholds"  # which reach every depth
        assert mean_depth(policy, seen) == pytest.approx(depth, abs=0.3)
    assert policies == candidate_policies(seen)


def test_a_model_of_two_layers_has_candidates() -> None:
    policies = candidate_policies(similarities()[:2])
    assert policies[0] == ExitPolicy.fixed(0)
    for policy in policies:
        policy.thresholds(2)
