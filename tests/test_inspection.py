"""`inspect_text` against untouched models of `transformers`."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from exit_reference import decode_with_exits, layer_similarities
from tiny_models import fake_quantised
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from river_llm import ExitPolicy, River, RiverConfig, attach_river
from river_llm.attachment import AttachedRiver
from river_llm.engines import TorchEngine
from river_llm.measure.inspection import TextInspection, inspect_text

TOKENS = torch.randint(0, 97, (40,), generator=torch.Generator().manual_seed(1)).tolist()
CONFIG = RiverConfig(bits=3)
THRESHOLDS = (math.inf, 0.935, 0.92, 0.88)  # tokens leave after any of the layers
MIXED = ExitPolicy.per_layer(THRESHOLDS)


@pytest.fixture
def attached(tiny_llama: PreTrainedModel) -> AttachedRiver:
    return attach_river(copy.deepcopy(tiny_llama), CONFIG, policy=MIXED)


@pytest.fixture
def river(tiny_llama: PreTrainedModel) -> River:
    return River.build(tiny_llama, CONFIG)


@pytest.mark.parametrize("policy", [MIXED, ExitPolicy.always(), ExitPolicy.never()])
def test_similarities_are_those_of_the_untouched_model(
    attached: AttachedRiver, tiny_llama: PreTrainedModel, policy: ExitPolicy
) -> None:
    attached.policy = policy
    similarities = inspect_text(attached, TOKENS).similarities
    expected = layer_similarities(tiny_llama, TOKENS)
    assert similarities.shape == (4, 40)
    torch.testing.assert_close(similarities.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("policy", [MIXED, ExitPolicy.always()])
def test_cosines_are_those_of_two_models_caches(
    attached: AttachedRiver, tiny_llama: PreTrainedModel, river: River, policy: ExitPolicy
) -> None:
    attached.policy = policy
    inspection = inspect_text(attached, TOKENS)
    backbone, quantised = _cache(tiny_llama), _cache(fake_quantised(tiny_llama, river))
    for name, measured in (
        ("keys", inspection.key_cosine),
        ("values", inspection.value_cosine),
    ):
        expected = [
            _mean_cosine(getattr(a, name), getattr(b, name))
            for a, b in zip(quantised.layers, backbone.layers, strict=True)
        ]
        assert measured.tolist() == pytest.approx(expected, abs=1e-6)
        assert max(expected) < 0.99
        assert len({round(cosine, 4) for cosine in expected}) == 4


def test_exit_layers_are_those_of_slow_decoding(
    attached: AttachedRiver, tiny_llama: PreTrainedModel, river: River
) -> None:
    _, expected = decode_with_exits(tiny_llama, river, TOKENS, THRESHOLDS)
    assert set(expected) == {1, 2, 3, 4}
    assert inspect_text(attached, TOKENS).exit_layers.tolist() == expected


@pytest.mark.parametrize(
    "policy",
    [
        MIXED,
        ExitPolicy.similarity(0.93),
        ExitPolicy.similarity(0.92, 2, prefill="sequence"),
        ExitPolicy.similarity(0.9, prefill="river", batch="minimum"),
        ExitPolicy.fixed(2),
        ExitPolicy.always(),
        ExitPolicy.never(),
    ],
    ids=lambda policy: policy.describe(),
)
def test_exit_layers_are_those_of_the_engines_decoding(
    attached: AttachedRiver, policy: ExitPolicy
) -> None:
    attached.policy = policy
    measured = inspect_text(attached, TOKENS).exit_layers.tolist()
    engine = TorchEngine(attached)
    decoded = [int(engine.decode(torch.tensor([token])).exit_layers[0]) for token in TOKENS]
    assert measured == decoded


def test_is_repeatable_and_leaves_the_policy(attached: AttachedRiver) -> None:
    first, second = inspect_text(attached, TOKENS), inspect_text(attached, TOKENS)
    for name in TextInspection.__dataclass_fields__:
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert attached.policy is MIXED
    assert not attached.router.record_similarities


def test_two_tokens_are_enough(attached: AttachedRiver) -> None:
    inspection = inspect_text(attached, TOKENS[:2])
    assert inspection.similarities.shape == (4, 2)
    assert inspection.exit_layers.shape == (2,)
    assert bool(inspection.key_cosine.isfinite().all())


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_an_error_leaves_the_policy_and_the_model(attached: AttachedRiver, passes: int) -> None:
    expected = inspect_text(attached, TOKENS)
    left = iter(range(passes, -1, -1))

    def fail(module: nn.Module, args: Any) -> None:
        if next(left) == 0:
            raise LookupError("gone")

    handle = attached.model.model.layers[2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(LookupError):
        inspect_text(attached, TOKENS)
    handle.remove()
    assert attached.policy is MIXED
    assert not attached.router.record_similarities
    again = inspect_text(attached, TOKENS)
    for name in TextInspection.__dataclass_fields__:
        assert torch.equal(getattr(again, name), getattr(expected, name))


@torch.no_grad()
def _cache(model: PreTrainedModel) -> DynamicCache:
    cache = DynamicCache()
    model(torch.tensor([TOKENS]), past_key_values=cache, use_cache=True)
    return cache


def _mean_cosine(a: Tensor, b: Tensor) -> float:
    """Over heads and tokens but the first, of `[1, heads, tokens, head_dim]`."""
    a, b = a[0, :, 1:].double(), b[0, :, 1:].double()
    cosines = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    assert cosines.shape == (2, 39)
    return float(cosines.sum()) / cosines.numel()
